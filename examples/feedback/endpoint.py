"""The model that people talk to: a server that speaks OpenAI's chat API, such as `transformers serve` or vLLM."""

from __future__ import annotations

import json
from typing import Any

from examples.warm_replies import need

DEFAULT_URL = "http://localhost:8000/v1"


class EndpointError(RuntimeError):
    """The server did not answer, or refused; the message says which server and why."""


class Endpoint:
    """A chat model behind `url`.

    Args:
        url: up to and with `/v1`.
        model: its name there. None: the first that is loaded.
        temperature, max_tokens: of every answer.
        timeout: seconds to wait for an answer.

    Raises:
        EndpointError: the server is not there, or has no such model.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        model: str | None = None,
        *,
        temperature: float = 0.8,
        max_tokens: int = 128,
        api_key: str = "none",
        timeout: float = 120.0,
    ) -> None:
        self.openai = need("openai", "openai")
        self.url = url
        self.client = self.openai.OpenAI(base_url=url, api_key=api_key, timeout=timeout, max_retries=0)
        self.settings: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        models = self._models()
        names = [m.id for m in models if (getattr(m, "status", None) or {}).get("value") != "unloaded"]
        if model is None and not names:
            raise EndpointError(f"{url} serves no model; `transformers serve FOLDER` serves one")
        if model is not None and names and model not in names:
            raise EndpointError(f"{url} serves no model {model!r}; it has {', '.join(names)}")
        self.model: str = model or names[0]
        if any(hasattr(m, "status") for m in models):
            # `transformers serve` draws an answer only where the model's folder says so, and would otherwise give the
            # same one each time, whatever the temperature.
            drawn = {"do_sample": temperature > 0, "temperature": temperature or 1.0}
            self.settings["extra_body"] = {"generation_config": json.dumps(drawn)}

    def answer(self, messages: list[dict[str, str]]) -> str:
        """The model's next turn.

        Whole, not piece by piece: nobody can rate half an answer then.

        Raises:
            EndpointError: the server is gone, refuses, or answers with nothing.
        """
        try:
            said = self.client.chat.completions.create(model=self.model, messages=messages, **self.settings)
        except Exception as error:
            raise self._explained(error) from error
        text = str((said.choices[0].message.content if said.choices else None) or "").strip()
        if not text:
            raise EndpointError(f"{self.url} gave an empty answer; ask again")
        return text

    def _models(self) -> list[Any]:
        try:
            return list(self.client.models.list())
        except Exception as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        if isinstance(error, self.openai.APITimeoutError):
            return EndpointError(f"{self.url} did not answer in {self.client.timeout:g} s")
        if isinstance(error, self.openai.APIConnectionError):
            return EndpointError(
                f"no server answers at {self.url}; start one with `transformers serve FOLDER --port 8000`, or name "
                "another with --endpoint"
            )
        if isinstance(error, self.openai.APIStatusError):
            return EndpointError(
                f"{self.url} refused with status {error.status_code}: {error.response.text[:300]}"
            )
        if isinstance(error, self.openai.OpenAIError):
            return EndpointError(f"{self.url} failed: {error}")
        return error
