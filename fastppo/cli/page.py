"""Pages for people: one HTML file with everything in it, curves as PNG, what machine it was."""

from __future__ import annotations

import base64
import io
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import need

TEMPLATES = Path(__file__).parent / "templates"
BEFORE, AFTER, SECOND, THIRD = "#8a8f98", "#d4622a", "#2f6fb2", "#3a9a76"


def render(template: Path, **values: Any) -> str:
    """A template (it may extend `page.html.j2`) with its values.

    Everything is escaped: what people and models wrote is never markup.
    """
    jinja2 = need("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template.name).render(**values)


def pyplot() -> Any:
    """matplotlib's, without a screen, in this project's dress."""
    matplotlib = need("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e8e8e6"}
    )
    plt.rcParams.update(
        {"axes.axisbelow": True, "xtick.labelsize": 8, "ytick.labelsize": 8, "font.family": "sans-serif"}
    )
    return plt


def png(figure: Any) -> bytes:
    """The figure, which is closed."""
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    pyplot().close(figure)
    return buffer.getvalue()


def inline(image: bytes) -> str:
    """For `src=`: a PNG inside the page."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def minutes_and_seconds(seconds: float) -> str:
    """For a person."""
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{seconds:.1f} s"


def describe_machine(command: Sequence[str]) -> dict[str, str]:
    """Processor, device, software, and the command that ran."""
    import torch
    import transformers

    import fastppo

    from ..info import processor

    threads = torch.get_num_threads()
    return {
        "processor": f"{processor()}, {threads} thread{'s' * (threads > 1)}",
        "device": "CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "software": f"fastppo {fastppo.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
        "command": shlex.join(command),
    }
