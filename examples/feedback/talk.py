"""A conversation in the terminal."""

from __future__ import annotations

import getpass
from typing import Any

from rich.console import Console
from rich.markup import escape

from examples.feedback.endpoint import Endpoint, EndpointError
from examples.feedback.store import DISLIKE, LIKE, Messages, Store

HELP = (
    "[bold]+[/bold] likes the last answer, [bold]-[/bold] dislikes it, [bold]= text[/bold] says it better, "
    "[bold]/again[/bold] asks for another answer, [bold]/new[/bold] starts over; an empty line ends the chat."
)


def talk(endpoint: Endpoint, store: Store, console: Console | None = None, rater: str | None = None) -> None:
    """Talk to `endpoint` until an empty line; every rating is stored as it is given."""
    console = console or Console()
    rater = rater or getpass.getuser()
    console.print(f"Talking to [bold]{escape(endpoint.model)}[/bold]. {HELP}\n", highlight=False)
    chat: Messages = []
    while said := _ask(console):
        if said in ("+", "-") or said.startswith("="):
            _feedback(said, chat, endpoint, store, rater, console)
        elif said == "/new":
            chat = []
        elif said == "/again" and not chat:
            console.print("[yellow]nothing was asked yet[/yellow]")
        else:
            if said == "/again":
                chat = chat[:-1] if chat[-1]["role"] == "assistant" else chat
            else:
                chat = [*chat, {"role": "user", "content": said}]
            try:
                answer = _answer(endpoint, chat, console)
            except EndpointError as error:
                console.print(f"[red]{escape(str(error))}[/red]\n/again tries once more", highlight=False)
            else:
                chat = [*chat, {"role": "assistant", "content": answer}]
    said_so_far = ", ".join(f"{number} {kind}" for kind, number in store.counts().items())
    console.print(f"stored in {store.path}: {said_so_far}", highlight=False, soft_wrap=True)


def _answer(endpoint: Endpoint, chat: Messages, console: Console) -> str:
    with console.status("…"):
        answer = endpoint.answer(chat)
    console.print(f"[bold]model[/bold]  {escape(answer)}", highlight=False)
    return answer


def _feedback(
    said: str, chat: Messages, endpoint: Endpoint, store: Store, rater: str, console: Console
) -> None:
    if not chat or chat[-1]["role"] != "assistant":
        console.print("[yellow]there is no answer yet to speak of[/yellow]")
        return
    prompt, answer = chat[:-1], chat[-1]["content"]
    try:
        if said in ("+", "-"):
            number = store.rate(
                prompt, answer, LIKE if said == "+" else DISLIKE, rater=rater, model=endpoint.model
            )
        else:
            number = store.rewrite(prompt, answer, said[1:], rater=rater, model=endpoint.model)
            chat[-1] = {"role": "assistant", "content": said[1:].strip()}
    except Exception as error:  # said again at once, while the rater still knows
        console.print(f"[red]not stored: {escape(str(error))}[/red]", highlight=False)
    else:
        console.print(f"[dim]stored as number {number}[/dim]")


def _ask(console: Any) -> str:
    try:
        return str(console.input("[bold]you[/bold]    ")).strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""
