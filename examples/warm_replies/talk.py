"""Chat with a model saved by the demo: python -m examples.warm_replies.talk FOLDER"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples.warm_replies.__main__ import keep_quiet


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.warm_replies.talk", description="Chat with the trained model."
    )
    parser.add_argument("model", type=Path, help="folder that the demo saved")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens in a reply (default 64)")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not (options.model / "config.json").exists():
        raise SystemExit(
            f"no model in {options.model}: expected a folder with config.json; `make demo` makes one"
        )
    keep_quiet()
    from rich.console import Console
    from rich.markup import escape

    from examples.warm_replies.warmth import warmth

    console = Console()
    with console.status("loading"):
        speaker = Speaker(options.model, options.tokens, options.temperature, options.seed)
        reward = warmth()
    console.print("Say something; an empty line ends the chat. Numbers: VADER's, and the critic's guess.\n")
    while said := _ask(console):
        reply, expected = speaker.answer(said)
        score = reward(prompts=[said], completions=[reply])[0]
        guess = "" if expected is None else f", expected {expected:+.2f}"
        console.print(
            f"[bold]model[/bold]  {escape(reply)}  [dim]{score:+.2f}{guess}[/dim]\n", highlight=False
        )


def _ask(console: Any) -> str:
    try:
        return str(console.input("[bold]you[/bold]    ")).strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""


class Speaker:
    """The saved policy and critic, the tokenizer, and the conversation so far."""

    def __init__(self, folder: Path, tokens: int, temperature: float, seed: int) -> None:
        from transformers import AutoTokenizer

        from fastppo.checkpoint import load_actor_critic

        self.actor_critic = load_actor_critic(folder).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.tokens, self.temperature, self.seed = tokens, temperature, seed
        self.chat: list[dict[str, str]] = []

    def answer(self, said: str) -> tuple[str, float | None]:
        """(reply, the reward that the critic expects of it before the first word is drawn)."""
        from fastppo.rollout import Sampling, rollout

        self.chat.append({"role": "user", "content": said})
        prompt = self.tokenizer.apply_chat_template(self.chat, add_generation_prompt=True, return_dict=False)
        answers = rollout(
            self.actor_critic.policy,
            [prompt],
            Sampling(self.tokens, self.temperature, stop_token_ids=(self.tokenizer.eos_token_id,)),
            pad_token_id=self.tokenizer.pad_token_id,
            seed=self.seed,
            first_episode=len(self.chat),
        )
        reply = self.tokenizer.decode(answers.completions()[0], skip_special_tokens=True).strip()
        self.chat.append({"role": "assistant", "content": reply})
        return reply, self._expected(prompt)

    def _expected(self, prompt: list[int]) -> float | None:
        import torch

        from fastppo.models import causal_trunk, hidden_states

        if self.actor_critic.value_head is None:
            return None
        with torch.no_grad():
            state = hidden_states(causal_trunk(self.actor_critic.policy), torch.tensor([prompt]))[0, -1]
            return float(self.actor_critic.value_head(state.float()))


if __name__ == "__main__":
    main()
