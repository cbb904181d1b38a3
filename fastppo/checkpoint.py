"""Policy and critic to disk and back; every folder is written under a temporary name and renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .models import CRITIC_ADAPTER, ActorCritic, is_peft

CRITIC = CRITIC_ADAPTER  # PEFT writes an adapter into a folder of its name
VALUE_HEAD = "value_head.safetensors"
CONTROLLERS = "controllers.json"
RANDOM_STATE = "random_state.safetensors"
EMA = "ema"
REFERENCE = "reference"


@contextmanager
def written_then_renamed(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well and vanishes when it does not.

    Where `path` exists already, its other files stay, and each new one replaces its old version by one rename.
    """
    final = Path(path).absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    os.chmod(temporary, 0o755)
    try:
        yield temporary
        if not final.exists():
            os.replace(temporary, final)
            return
        for entry in sorted(temporary.iterdir()):
            target = final / entry.name
            if target.is_dir():
                old = final / f".{entry.name}.old"
                shutil.rmtree(old, ignore_errors=True)
                os.replace(target, old)
                os.replace(entry, target)
                shutil.rmtree(old)
            else:
                os.replace(entry, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_actor_critic(model: ActorCritic, folder: Path) -> None:
    """Policy as `from_pretrained` reads it, and the critic in `critic/`: a sequence classifier (or its adapter), or the
    value head, beside its adapter if it has one.
    """
    model.policy.save_pretrained(folder)  # type: ignore[operator]
    if model.value_model is not None:
        model.value_model.save_pretrained(folder / CRITIC)  # type: ignore[operator]
    else:
        assert model.value_head is not None
        (folder / CRITIC).mkdir(exist_ok=True)
        save_tensors(model.value_head.state_dict(), folder / CRITIC / VALUE_HEAD)


def save_policy(policy: Any, folder: Path) -> None:
    """The policy alone, as `from_pretrained` reads it."""
    if is_peft(policy):
        policy.save_pretrained(
            folder, selected_adapters=[n for n in policy.peft_config if n != CRITIC_ADAPTER]
        )
    else:
        policy.save_pretrained(folder)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Named tensors as safetensors."""
    save_file({name: x.contiguous() for name, x in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What `save_tensors` wrote.

    Raises:
        FileNotFoundError: it did not.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path.parent} holds no {path.name}")
    return load_file(path)


def save_random_state(path: Path) -> None:
    """The random state of torch itself. The trainer draws nothing from it, but optimizers that round by chance do."""
    states = {"cpu": torch.get_rng_state()}
    if torch.accelerator.is_available():
        states["device"] = torch.get_device_module().get_rng_state()
    save_tensors(states, path)


def load_random_state(path: Path) -> None:
    """Go on from what `save_random_state` wrote, on every rank: all have to round alike.

    Raises:
        FileNotFoundError: it did not.
    """
    states = load_tensors(path)
    torch.set_rng_state(states["cpu"])
    if "device" in states and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(states["device"])


def load_actor_critic(path: str | os.PathLike[str], **kwargs: Any) -> ActorCritic:
    """Policy and critic from a folder that `PPOTrainer.save_model` (or a checkpoint of it) wrote.

    Args:
        path: the folder.
        kwargs: handed to `from_pretrained` (dtype, attn_implementation, ...).

    Raises:
        FileNotFoundError: the folder holds no critic.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder = Path(path)
    if not (folder / CRITIC).is_dir():
        raise FileNotFoundError(f"{folder} holds no critic: expected a folder `{CRITIC}` in it")
    if (folder / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        policy: Any = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, **kwargs)
    else:
        policy = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    adapted = (folder / CRITIC / "adapter_config.json").exists()
    if (folder / CRITIC / VALUE_HEAD).exists():
        if adapted:
            policy.load_adapter(folder / CRITIC, CRITIC_ADAPTER, is_trainable=True)
        model = ActorCritic(policy)
        assert model.value_head is not None
        model.value_head.load_state_dict(load_file(folder / CRITIC / VALUE_HEAD))
        return model
    if adapted:
        from peft import AutoPeftModelForSequenceClassification

        kwargs = {**kwargs, "is_trainable": True}
        critic: Any = AutoPeftModelForSequenceClassification
    else:
        critic = AutoModelForSequenceClassification
    return ActorCritic(policy, critic.from_pretrained(folder / CRITIC, num_labels=1, **kwargs))


def restore_actor_critic(model: ActorCritic, folder: Path) -> None:
    """Load a checkpoint's weights into a model of the same shape.

    Raises:
        ValueError: the checkpoint lacks weights that the model has, or has others.
    """
    restore(model.policy, folder)
    if model.value_model is not None:
        restore(model.value_model, folder / CRITIC)
    else:
        assert model.value_head is not None
        model.value_head.load_state_dict(load_file(folder / CRITIC / VALUE_HEAD))


def restore(model: nn.Module, folder: Path) -> None:
    """Load the weights that `save_pretrained` wrote into a model of the same shape.

    Raises:
        ValueError: the folder lacks weights that the model has, or has others.
    """
    if is_peft(model):
        from peft import set_peft_model_state_dict

        for name in model.peft_config:  # type: ignore[union-attr]
            adapter = folder if name == "default" else folder / name
            weights = load_file(adapter / "adapter_model.safetensors")
            set_peft_model_state_dict(model, weights, adapter_name=name)
        return
    missing, unexpected = model.load_state_dict(_weights(folder), strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise ValueError(
            f"checkpoint {folder} does not fit the model: missing {missing}, unexpected {unexpected}"
        )
    model.tie_weights()  # type: ignore[operator]


def _weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    weights: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"checkpoint {folder} holds no {name}")
        weights.update(load_file(folder / name))
    return weights


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete `checkpoint-N` of a run."""
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(str(output_dir)) if Path(output_dir).is_dir() else None
    return Path(found) if found else None
