"""A conversation in the browser: Gradio's chat, with like, dislike and rewrite under every answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from examples.feedback.endpoint import Endpoint, EndpointError
from examples.feedback.port import check_port
from examples.feedback.store import DISLIKE, LIKE, WITHDRAWN, Messages, Store

ABOUT = (
    "Thumbs say whether an answer is good; the pencil lets you write the answer you would rather have had; "
    "the arrow asks for another one."
)


def build(endpoint: Endpoint, store: Store) -> gr.ChatInterface:
    """The page, as a Gradio application that is not launched yet."""

    def answer(message: str, history: list[dict[str, Any]]) -> str | list[Any]:
        try:
            return endpoint.answer(_messages([*history, {"role": "user", "content": message}]))
        except EndpointError as error:
            gr.Warning(str(error), duration=None)  # raised as gr.Error it would leave the text box locked
            return []

    def rate(history: list[dict[str, Any]], event: gr.LikeData, request: gr.Request) -> str:
        # Gradio says "" of a thumb that is clicked a second time.
        rating = LIKE if event.liked is True else DISLIKE if event.liked is False else WITHDRAWN
        index = _index(event)
        with _reported():
            store.rate(
                _messages(history[:index]),
                _text(history[index]["content"]),
                rating,
                rater=_rater(request),
                model=endpoint.model,
            )
        return _stored(store)

    def rewrite(
        history: list[dict[str, Any]], event: gr.EditData, request: gr.Request
    ) -> tuple[list[dict[str, Any]], str]:
        index = _index(event)
        if history[index]["role"] != "assistant":
            gr.Warning("Only answers are rewritten; send another message to ask something else.")
            return history, _stored(store)
        with _reported():
            store.rewrite(
                _messages(history[:index]),
                _text(event.previous_value),
                event.value,
                rater=_rater(request),
                model=endpoint.model,
            )
        # The conversation goes on from what should have been said.
        return [*history[:index], {"role": "assistant", "content": event.value.strip()}], _stored(store)

    chatbot = gr.Chatbot(
        editable="all", buttons=["copy"], label=endpoint.model, placeholder="Say something.", height=480
    )
    page = gr.ChatInterface(
        answer,
        chatbot=chatbot,
        title="Talk and rate",
        description=ABOUT,
        api_visibility="private",
        analytics_enabled=False,
    )
    with page:
        status = gr.Markdown(_stored(store), elem_id="stored")
        chatbot.like(rate, chatbot, status, api_visibility="private", show_progress="hidden")
        chatbot.edit(
            rewrite,
            chatbot,
            [page.chatbot_value, status],
            api_visibility="private",
            show_progress="hidden",
        )
        page.load(lambda: _stored(store), None, status, api_visibility="private")
    return page


def serve(
    endpoint: Endpoint, store: Store, host: str = "127.0.0.1", port: int = 7860, *, block: bool = True
) -> Any:
    """Serve the page; with `block=False` it is returned and serves until its `close()`.

    Raises:
        SystemExit: the port is taken; the message says by whom, and which is free.
    """
    check_port(host, port)
    page = build(endpoint, store)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        ssr_mode=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none is fetched
    )
    if block:
        print(f"open http://{host}:{port} · feedback goes to {store.path} · Ctrl-C ends", flush=True)
        page.block_thread()
    return page


@contextmanager
def _reported() -> Iterator[None]:
    """Feedback that could not be stored is said in the page, while the rater still knows what it was."""
    try:
        yield
    except Exception as error:
        raise gr.Error(f"Not stored: {error}", duration=None, print_exception=False) from error


def _text(content: Any) -> str:
    """Gradio hands a message as text, or as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)


def _messages(history: list[dict[str, Any]]) -> Messages:
    """The history as the model reads it, without messages that got no answer, as after an error: chat templates want
    turns that alternate.
    """
    messages = [{"role": m["role"], "content": _text(m["content"])} for m in history]
    followers = [m["role"] for m in messages[1:]] + [""]
    return [m for m, n in zip(messages, followers, strict=True) if not m["role"] == n == "user"]


def _index(event: gr.LikeData | gr.EditData) -> int:
    return event.index if isinstance(event.index, int) else event.index[0]


def _rater(request: Any) -> str:
    return str(request.username or request.session_hash)


def _stored(store: Store) -> str:
    return "Stored: " + ", ".join(f"{number} {kind}" for kind, number in store.counts().items()) + "."
