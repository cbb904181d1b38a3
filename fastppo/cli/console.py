"""What a command shows: coloured tables for a person, or one JSON object for a machine."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from . import need


class Screen:
    """Where a command's words go.

    Args:
        as_json: stdout gets one JSON object at the end and nothing else; all that people read goes to stderr.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.machine = sys.stdout
        stream = sys.stderr if as_json else sys.stdout
        # Without a terminal nobody's window limits the width.
        width = None if stream.isatty() else 120
        self.console = need("rich.console", "rich").Console(
            file=stream, highlight=False, soft_wrap=True, width=width
        )

    def say(self, text: str, style: str | None = None) -> None:
        """One line; square brackets are text."""
        self.console.print(need("rich.text", "rich").Text(text, style=style or ""))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table with names on the left and figures on the right."""
        rich_table, text = need("rich.table", "rich"), need("rich.text", "rich").Text
        table = rich_table.Table(title=title, title_justify="left", title_style="bold", show_edge=False)
        for i, name in enumerate(columns):
            table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(text(cell, style="" if i else "cyan") for i, cell in enumerate(row)))
        self.console.print(table)

    def result(self, report: dict[str, Any]) -> None:
        """The command's outcome, for a machine."""
        if self.as_json:
            print(json.dumps(report, ensure_ascii=False, default=str), file=self.machine, flush=True)

    def bar(self, total: int, done: int) -> Any:
        """A live bar on stderr; without a terminal there, None."""
        tqdm = need("tqdm").tqdm
        if not sys.stderr.isatty():
            return None
        return tqdm(total=total, initial=done, dynamic_ncols=True, unit="step")

    @contextmanager
    def only_json(self) -> Iterator[None]:
        """Within the block whatever prints to stdout prints to stderr, where a machine reads stdout."""
        if not self.as_json:
            yield
            return
        with redirect_stdout(sys.stderr):
            yield


def quiet() -> None:
    """Bars of training and errors are shown, chatter is not."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    for name in ("accelerate", "transformers", "trl", "datasets", "torch", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
