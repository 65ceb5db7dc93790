"""What ``depthwire convert`` costs against plain ``torch.export`` + ``torch.onnx.export`` + save of the same model.

Both sides run in processes of their own, in turn, each from the same Hugging Face directory to files on disk; the
plain side rewrites nothing, checks nothing and stores no goldens. Engine build and verify are left out on both sides.

Prints ``convert_wall_ratio`` and ``convert_rss_ratio`` (peak RSS over the bytes of the weights), with the plain side's
own figures beside them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

from benchmarks._report import common_arguments, report

if TYPE_CHECKING:
    from pathlib import Path

_PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
source, out, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits
with torch.no_grad():
    exported = torch.export.export(Logits(), (torch.zeros(1, length, dtype=torch.long),))
program = torch.onnx.export(exported, dynamo=True, verbose=False)
program.save(out + "/model.onnx", external_data=True)
"""

_OURS = """
import sys, depthwire
source, out, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
depthwire.convert(source, out + "/artifact", attn_res="block:8", seq_len=length, verify=False, build=False)
"""

_MEASURE = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
done = subprocess.run([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
seconds = time.perf_counter() - started
if done.returncode:
    sys.exit(done.stderr.decode())
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""


def measure(code: str, source: Path, length: int) -> tuple[float, float]:
    """Run one side once: wall seconds of the process, and its peak RSS in bytes."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", _MEASURE, code, str(source), out, str(length)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, rss = json.loads(done.stdout)
    return seconds, rss


def main() -> None:
    arguments = common_arguments(__doc__, runs=3).parse_args()
    weights = sum(file.stat().st_size for file in arguments.model.glob("*.safetensors"))
    sides: dict[str, list[tuple[float, float]]] = {"plain": [], "depthwire": []}
    for _ in range(arguments.runs):
        for name, code in (("plain", _PLAIN), ("depthwire", _OURS)):
            sides[name].append(measure(code, arguments.model, arguments.seq_len))
    wall = {name: statistics.median(run[0] for run in runs) for name, runs in sides.items()}
    rss = {name: statistics.median(run[1] for run in runs) / weights for name, runs in sides.items()}
    plain = f"plain torch.export + torch.onnx.export + save, {arguments.model.name}, length {arguments.seq_len}"
    report("plain_wall", wall["plain"], "s", plain, arguments.runs)
    report("convert_wall", wall["depthwire"], "s", "depthwire convert, without verify and build", arguments.runs)
    report("convert_wall_ratio", wall["depthwire"] / wall["plain"], "ratio", plain, arguments.runs)
    report("plain_rss_ratio", rss["plain"], "ratio", "bytes of the weights", arguments.runs)
    report("convert_rss_ratio", rss["depthwire"], "ratio", "bytes of the weights", arguments.runs)


if __name__ == "__main__":
    main()
