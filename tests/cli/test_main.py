"""The command line as a program: what it imports, what it prints, and the status it ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from depthwire.cli._group import VERBS
from depthwire.cli.main import cli, main
from depthwire.errors import PassError
from tests.signals import skip_if_ignored

if TYPE_CHECKING:
    from pathlib import Path

IMPORT_PROBE = """
import sys, time
began = time.perf_counter()
from depthwire.cli.main import main
from tests.signals import skip_if_ignored
status = main({arguments!r})
print(status, time.perf_counter() - began, *(m for m in {heavy!r} if m in sys.modules), file=sys.stderr)
"""
HEAVY = ["torch", "transformers", "onnx", "onnxruntime", "onnxscript", "tensorrt_rtx", "polygraphy", "numpy"]


def _probe(*arguments: str) -> list[str]:
    code = IMPORT_PROBE.format(arguments=list(arguments), heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[-1].split()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        *((verb, "--help") for verb in VERBS),
        ("targets",),
        ("doctor",),
        ("convert", "m", "-o", "o", "--attn-res", "block:0"),
        ("convert", "m", "-o", "o", "--target", "rtxx"),
    ],
)
def test_what_needs_no_model_imports_no_torch(arguments: tuple[str, ...]) -> None:
    _, _, *imported = _probe(*arguments)
    assert imported == []


def test_help_is_immediate() -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "depthwire", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.6, seconds


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    result = CliRunner().invoke(cli, [verb, "--help"])
    assert result.exit_code == 0
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    assert command.help
    for option in ("--json", "--quiet", "--verbose", "--no-color"):
        assert option in result.output
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{verb} {parameter.name} has no help"


def test_the_overview_names_every_verb_and_the_exit_codes() -> None:
    output = CliRunner().invoke(cli, ["--help"]).output
    for verb, entry in VERBS.items():
        assert verb in output
        assert entry.summary.split(",")[0] in output
    assert "7 parity failed" in " ".join(output.split())


@pytest.mark.parametrize(
    "mistake",
    [
        (["convrt", "m"], "cli.unknown-verb", 2, "Did you mean 'depthwire convert'?"),
        (["zzzzz"], "cli.unknown-verb", 2, "Try 'depthwire --help'."),
        (["convert", "m", "--atn-res", "full"], "cli.unknown-option", 2, "Did you mean '--attn-res'?"),
        (["convert", "m", "--batch", "two"], "cli.bad-value", 2, "Try 'depthwire convert --help'."),
        (["convert", "m", "--task", "speech"], "cli.bad-value", 2, "Try 'depthwire convert --help'."),
        (["verify"], "cli.bad-value", 2, "Try 'depthwire verify --help'."),
        (["convert", "-o", "o"], "recipe.no-source", 2, "source: {reference"),
        (["convert", "m"], "export.no-output", 2, "-o DIR"),
        (["convert", "m", "-o", "o", "--attn-res", "block:0"], "recipe.attn-res", 2, "docs/recipe.md"),
        (["convert", "m", "-o", "o", "--attn-res", "blocks"], "recipe.attn-res", 2, "docs/recipe.md"),
        (["convert", "m", "-o", "o", "--batch", "0"], "recipe.bad-value", 2, "docs/recipe.md"),
        (["convert", "m", "-o", "o", "--cc", "ampere"], "recipe.bad-value", 2, "docs/recipe.md"),
        (["convert", "m", "-o", "o", "--target", "rtxx"], "target.unknown", 2, "Did you mean 'rtx'?"),
        (
            ["convert", "m", "-o", "o", "--target", "rtx", "--cc", "SM90"],
            "target.compute-capability-unsupported",
            2,
            "",
        ),
        (["convert", "m", "-o", "o", "--recipe", "none.yaml"], "recipe.not-found", 2, "--save-recipe"),
        (["rewrite", "m", "-o", "o.bin"], "export.output-name", 2, "o.pt2"),
        (["verify", "nowhere"], "artifact.not-an-artifact", 5, "depthwire convert -o"),
        (["build", "nowhere"], "artifact.not-an-artifact", 5, "depthwire convert -o"),
        (["targets", "rtxx"], "target.unknown", 2, "Did you mean 'rtx'?"),
    ],
)
def test_a_mistake_has_its_code_status_and_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mistake: tuple[list[str], str, int, str],
) -> None:
    arguments, code, status, hint = mistake
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    text = capsys.readouterr()
    assert text.out == ""
    assert text.err.startswith(("error: ", "✗"))
    assert f"[{code}]" in text.err
    assert hint in text.err

    assert main([*arguments, "--json"]) == status
    text = capsys.readouterr()
    document = json.loads(text.out)
    assert (document["error"], document["exit_code"]) == (code, status)
    assert hint in document["do"]
    assert text.err == ""
    assert list(tmp_path.iterdir()) == []


def _broken(_group: click.Group, _ctx: click.Context, _name: str) -> click.Command:
    def fail() -> None:
        raise ZeroDivisionError("an invariant")

    return click.Command("doctor", callback=fail)


def test_what_nobody_foresaw_is_our_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("depthwire.cli._group.VerbGroup.get_command", _broken)
    assert main(["doctor"]) == 70
    text = capsys.readouterr().err
    assert "a bug of ours" in text
    assert "ZeroDivisionError: an invariant" in text
    assert "Traceback" not in text


def test_the_traceback_of_a_bug_comes_with_v(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("depthwire.cli.main.cli.main", lambda *_a, **_k: 1 // 0)
    assert main(["doctor", "-v"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("depthwire.cli.doctor.command.callback", interrupted)
    assert main(["doctor"]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_errors_of_the_verbs_keep_their_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise PassError("structure.break", "The norm comes after", at="bert.layer.0 [x]", want="a", got="b", todo="c")

    monkeypatch.setattr("depthwire.cli.doctor.command.callback", refuse)
    assert main(["doctor"]) == 4
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "error: The norm comes after  [structure.break]"
    assert lines[1:] == ["at: bert.layer.0 [x]", "wanted: a", "found: b", "do: c"]


FACTORY = """
import pathlib, time

def slow():
    pathlib.Path("started").touch()
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals end a process there without asking it")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_leaves_nothing(tmp_path: Path, number: signal.Signals, status: int) -> None:
    skip_if_ignored(number)
    (tmp_path / "slow_model.py").write_text(FACTORY, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "depthwire", "convert", "slow_model:slow", "-o", "out", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "started").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert json.loads(out)["error"] == "cli.interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slow_model.py", "started"]


def test_targets_and_doctor_speak_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--json"]) == 0
    assert "rtx" in {target["name"] for target in json.loads(capsys.readouterr().out)["targets"]}
    assert main(["targets", "rtx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["builder"] == "tensorrt-rtx"
    assert main(["doctor", "--json"]) == 0
    assert {"torch", "onnx"} <= {finding["name"] for finding in json.loads(capsys.readouterr().out)["findings"]}


def test_targets_and_doctor_speak_to_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    text = capsys.readouterr().out
    assert "ort-cpu" in text
    assert "jetson-orin-nano-4" in text
    assert main(["targets", "rtx"]) == 0
    rtx = capsys.readouterr().out
    assert "Hopper" in rtx
    assert "SM120" in rtx
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["doctor", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
