"""The README of a bundle: what to run on the device, in the words of this very bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthwire.runtime.memory import gigabytes

if TYPE_CHECKING:
    from depthwire.runtime.deploy.manifest import Bundle

_TEXT = """\
# Engine bundle for {title}

Written by Depthwire {depthwire} for target `{target}`: precision {precision}, custom operators as {form}s. Nothing in
it was run on the target: the command below does that, and says what it found.

    python3 build_and_verify.py

It checks this device, builds {engines} in `work/`, compares with the goldens, measures latency, and writes
`work/result.json`. Take that file home: `depthwire verify DIRECTORY --result result.json`.

| needed | |
|---|---|
| device | {device} |
| GPU | {gpu} |
| builder | `{package}` {at_least} or later, below {below} |
| Python | 3.10 or later with numpy and polygraphy (`python3 -m pip install numpy polygraphy`); no PyTorch |
| memory | about {memory} free for the build |
| disk | {disk} |

`--dry-run` only checks. `--work DIR` puts engines and results elsewhere. After a kill or a reboot run the same command
again: finished engines are kept. Set the power mode first (on a Jetson `sudo nvpmodel -m 0 && sudo jetson_clocks`):
what is measured is recorded with it.

| exit code | meaning |
|---|---|
| 0 | built, and the engine computes what the goldens say |
| 2 | usage |
| 6 | a build or a run failed: see `work/build.log` |
| 7 | the engine computes something else |
| 8 | the device is not what the bundle was made for, or the bundle is damaged |
| 9 | built, not verified: no GPU |
"""


def readme(bundle: Bundle) -> str:
    """Return the text."""
    platform, builder = bundle.platform, bundle.builder
    predicted = max((model.predicted_bytes or 0 for model in bundle.models), default=0) + builder.floor_bytes
    jetpack = f", JetPack {platform.jetpack} (L4T {platform.l4t})" if platform.jetpack else ""
    return _TEXT.format(
        title=bundle.title,
        depthwire=bundle.depthwire,
        target=bundle.target,
        precision=bundle.precision,
        form=bundle.form,
        engines=", ".join(f"`{model.engine}`" for model in bundle.models),
        device=(bundle.title if platform.boards else "any machine with such a GPU") + jetpack,
        gpu=" or ".join(platform.compute_capabilities),
        package=platform.package,
        at_least=platform.tensorrt_at_least,
        below=platform.tensorrt_below,
        memory=gigabytes(predicted),
        disk=gigabytes(builder.disk_bytes),
    )
