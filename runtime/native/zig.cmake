# Toolchain for wheels: the C++ compiler of the package ziglang, which compiles for any CPU and links for any glibc.
#
#   cmake ... -DCMAKE_TOOLCHAIN_FILE=zig.cmake -DZIG=/path/to/zig -DDEPTHWIRE_CPU=aarch64 -DDEPTHWIRE_GLIBC=2.28
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR ${DEPTHWIRE_CPU})
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ZIG DEPTHWIRE_CPU DEPTHWIRE_GLIBC)
set(CMAKE_CXX_COMPILER ${ZIG} c++)
set(CMAKE_CXX_COMPILER_TARGET ${DEPTHWIRE_CPU}-linux-gnu.${DEPTHWIRE_GLIBC})
