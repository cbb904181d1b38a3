"""``python -m fastppo.info``: what this installation is made of and will use. ``--json`` for machines."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
from typing import Any

import torch

from . import __version__


def collect() -> dict[str, Any]:
    """Return the facts as a dictionary of plain values."""
    from .ops._library import library

    facts = library.build_facts()
    return {
        "fastppo": __version__,
        "python": platform.python_version(),
        "torch": {"running": torch.__version__, "built_against": facts["torch"]},
        "transformers": _version("transformers"),
        "accelerate": _version("accelerate"),
        "compiler": facts["compiler"],
        "cpu": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "instruction_sets": {
                "compiled": [name.lower() for name in facts["instruction_sets"]],
                "active": library.cpu_capability(),
            },
        },
        "cuda": {
            "build": facts["cuda"],
            "archs": facts["cuda_archs"],
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "attention": _attention_backends(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the facts; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastppo.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else _page(facts))
    return 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The name of this machine's processor."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _attention_backends() -> dict[str, str]:
    """Return, for each back end that transformers names, whether it can be used here and if not why."""
    backends = {"sdpa": "available", "eager": "available"}
    flash = _version("flash_attn")
    if flash is None or importlib.util.find_spec("flash_attn") is None:
        backends["flash_attention_2"] = "flash-attn is not installed (pip install fastppo[flash])"
    elif not torch.cuda.is_available():
        backends["flash_attention_2"] = f"flash-attn {flash} is installed, but there is no CUDA device"
    else:
        backends["flash_attention_2"] = f"available (flash-attn {flash}), in half precision"
    return backends


def _page(facts: dict[str, Any]) -> str:
    torch_facts, cpu, cuda = facts["torch"], facts["cpu"], facts["cuda"]
    sets = cpu["instruction_sets"]
    rows = [
        ("fastppo", facts["fastppo"]),
        ("python", facts["python"]),
        ("torch", f"{torch_facts['running']} (built against {torch_facts['built_against']})"),
        ("transformers", facts["transformers"] or "not installed"),
        ("accelerate", facts["accelerate"] or "not installed"),
        ("compiler", facts["compiler"]),
        ("processor", f"{cpu['processor']}, {cpu['threads']} threads"),
        ("instruction sets", f"{', '.join(sets['compiled'])} compiled; {sets['active']} active"),
        ("CUDA kernels", cuda["build"] + (f"; archs {', '.join(cuda['archs'])}" if cuda["archs"] else "")),
        ("CUDA devices", ", ".join(cuda["devices"]) or "none"),
    ]
    rows += [("attention", f"{name}: {state}") for name, state in facts["attention"].items()]
    width = max(len(name) for name, _ in rows)
    lines, before = [], ""
    for name, value in rows:
        lines.append(f"{'' if name == before else name:<{width}}  {value}")
        before = name
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
