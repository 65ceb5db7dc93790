"""The ways that work on a device can fail, as errors: one function, or one entry, for each.

Error codes: ``remote.address``, ``remote.auth``, ``remote.bad-bundle``, ``remote.busy``, ``remote.disk-full``,
``remote.host-key``, ``remote.killed``, ``remote.lost``, ``remote.no-python``, ``remote.not-ours``, ``remote.outside``,
``remote.system``, ``remote.unreachable``.
"""

from __future__ import annotations

from depthwire.errors import RemoteError, UsageError

_AUTHENTICATION = ("permission denied (", "too many authentication failures", "no more authentication methods")
_HOST_KEY = ("host key verification failed", "host identification has changed", "host key is known")


def address(given: str, got: str) -> UsageError:
    """Return the error for an address that cannot be one."""
    return UsageError(
        "remote.address",
        "This is not the address of a device",
        at=f"--on {given!r}",
        want="[user@]host[:port], with the host's name, its alias in ~/.ssh/config, its IPv4 address or [IPv6 address]",
        got=got,
        todo="Give an address that 'ssh ADDRESS' takes.",
    )


def connection(where: str, text: str) -> RemoteError:
    """Return the error for a connection that could not be made, from what ``ssh`` said."""
    lower = text.lower()
    got = "; ".join(line.strip() for line in text.splitlines() if line.strip(" @\r")) or "ssh said nothing"
    if any(sign in lower for sign in _HOST_KEY):
        changed = "changed" in lower
        return RemoteError(
            "remote.host-key",
            "The device's host key has changed" if changed else "The device's host key is not known here",
            at=where,
            want="the key that known_hosts lists for this address",
            got=got,
            todo="If the device was set up anew, remove the old key ('ssh-keygen -R HOST') and connect once with ssh."
            if changed
            else "Connect once with ssh, compare the fingerprint that it shows with the device's, and accept it.",
        )
    if any(sign in lower for sign in _AUTHENTICATION):
        return RemoteError(
            "remote.auth",
            "The device refuses the log-in",
            at=where,
            want="a key that logs in without a question (there is no terminal to ask for a password)",
            got=got,
            todo="Give the key with --identity, put it into ssh-agent, or install it with 'ssh-copy-id'.",
        )
    return RemoteError(
        "remote.unreachable",
        "The device cannot be reached",
        at=where,
        want="an SSH server that answers at this address",
        got=got,
        todo="Check address, port and network; 'ssh ADDRESS true' must work.",
    )


def lost(where: str, attempts: int, got: str) -> RemoteError:
    """Return the error for a connection that broke and could not be made again."""
    return RemoteError(
        "remote.lost",
        "The connection to the device broke and could not be made again",
        at=where,
        want="a connection",
        got=f"{attempts} attempts; the last: {got}",
        todo="Run the same command again: it goes on where it was. A build that had begun goes on without us.",
    )


def no_python(where: str, python: str, got: str) -> RemoteError:
    """Return the error for a device whose Python does not answer, or is too old."""
    return RemoteError(
        "remote.no-python",
        "There is no usable Python on the device",
        at=f"{python} on {where}",
        want="Python 3.10 or newer",
        got=got,
        todo="Install python3 there, or name the interpreter with --python.",
    )


def killed(where: str, how: str, tail: str) -> RemoteError:
    """Return the error for a script that ended without an exit code."""
    return RemoteError(
        "remote.killed",
        "build_and_verify.py was killed on the device",
        at=where,
        want="an exit code",
        got=f"{how}; its last lines: {tail or '(none)'}",
        todo="Most often memory ran out: free some, or add swap. Run the same command again: it goes on where it was.",
    )


def refused(where: str, reason: str, found: str) -> RemoteError:
    """Return the error for what the device's side would not, or could not, do."""
    what, want, todo = _REFUSED.get(reason, _REFUSED["system"])
    code = f"remote.{reason}" if reason in _REFUSED else "remote.system"
    return RemoteError(code, what, at=where, want=want, got=found, todo=todo)


_REFUSED = {
    "busy": (
        "Something else runs in this folder of the device",
        "a folder of its own for each bundle",
        "Wait for it, end it with --cancel, or give another folder with --remote-dir.",
    ),
    "disk-full": (
        "The device's disk is full",
        "room for the bundle, the engine and the timing cache",
        "Free space there, or choose a folder on another disk with --remote-dir; then run the same command again.",
    ),
    "not-ours": (
        "The folder on the device holds something else",
        "a folder that is not there, is empty, or was made by an earlier run",
        "Give another folder with --remote-dir.",
    ),
    "outside": (
        "A file of the bundle would lie outside its folder on the device",
        "relative paths inside the folder",
        "Do not use this bundle: it was tampered with.",
    ),
    "bad-bundle": (
        "A file of the bundle is not what bundle.json says",
        "the sizes and hashes of bundle.json",
        "Make the bundle again; do not use it as it is.",
    ),
    "system": (
        "The device cannot do what was asked",
        "a folder that can be written, and processes that can be started",
        "See what was found; give another folder with --remote-dir if it is about this one.",
    ),
}
