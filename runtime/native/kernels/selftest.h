// The parts of the self-test, each for one instruction set; they print a line and return the number of failures.
#pragma once

int check_routing(const char* instruction_set);
