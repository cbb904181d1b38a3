"""`fastppo.sb3.PPO` and stable-baselines3's own train the same weights and log the same numbers."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common import buffers
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from examples import text_generation_env as text
from fastppo.sb3 import PPO, DictRolloutBuffer, RolloutBuffer, gae_of_rollout

SMALL = {
    "n_steps": 64,
    "batch_size": 50,
    "n_epochs": 3,
    "device": "cpu",
}  # the last mini-batch is a short one


class PoleInADict(gymnasium.ObservationWrapper):
    """Position and angle of CartPole by name."""

    def __init__(self, env):
        super().__init__(env)
        space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
        self.observation_space = gymnasium.spaces.Dict({"cart": space, "pole": space})

    def observation(self, observation):
        return {"cart": observation[:2], "pole": observation[2:]}


def dict_pole():
    return PoleInADict(gymnasium.make("CartPole-v1"))


def sentences():
    return text.TextGenerationEnv([("how", "are", "you", "today"), ("i", "am", "fine")])


def both(env="CartPole-v1", policy="MlpPolicy", updates=3, n_envs=3, **settings):
    """A model of either side after some updates from the same seed."""
    models = []
    for kind in (stable_baselines3.PPO, PPO):
        model = kind(policy, make_vec_env(env, n_envs=n_envs, seed=3), seed=3, **{**SMALL, **settings})
        models.append(model.learn(updates * model.n_steps * n_envs))
    return models


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


CASES = {
    "defaults": {},
    "value clipping": {"clip_range_vf": 0.05},
    "entropy, weights": {"ent_coef": 0.02, "vf_coef": 0.3, "max_grad_norm": 0.1, "gae_lambda": 0.8},
    "schedules": {"learning_rate": lambda left: 1e-2 * left, "clip_range": lambda left: 0.1 + 0.1 * left},
    "target_kl": {"target_kl": 1e-3, "learning_rate": 3e-3},
    "advantages as they are": {"normalize_advantage": False, "gamma": 0.9},
    "mini-batches of one": {"batch_size": 1, "normalize_advantage": False, "n_steps": 8, "updates": 2},
    "dictionaries": {"env": dict_pole, "policy": "MultiInputPolicy"},
    "continuous": {"env": "Pendulum-v1"},
    "gSDE": {"env": "Pendulum-v1", "use_sde": True, "sde_sample_freq": 4, "ent_coef": 0.01},
    # Its entropy has no formula: the mean of -log-prob stands for it.
    "squashed gSDE": {
        "env": "Pendulum-v1",
        "use_sde": True,
        "policy_kwargs": {"squash_output": True},
        "ent_coef": 0.01,
    },
    "text": {"env": sentences, "policy_kwargs": text.POLICY, "ent_coef": 0.01},
    "other optimizer": {"policy_kwargs": {"optimizer_class": torch.optim.RMSprop}},
}


@pytest.mark.parametrize("case", CASES)
def test_same_weights_and_log_as_stable_baselines3(case):
    stock, ours = both(**CASES[case])
    assert isinstance(ours.rollout_buffer, (RolloutBuffer, DictRolloutBuffer))
    torch.testing.assert_close(weights(ours), weights(stock), rtol=1e-4, atol=2e-6)
    logged, expected = ours.logger.name_to_value, stock.logger.name_to_value
    training = {name for name in expected if name.startswith("train/")}
    assert "train/approx_kl" in training
    assert training == {name for name in logged if name.startswith("train/")}
    for name in training:
        assert logged[name] == pytest.approx(expected[name], rel=2e-3, abs=2e-6), name


def test_target_kl_ends_the_same_update():
    stock, ours = both(target_kl=1e-4, learning_rate=1e-2, updates=2)
    assert ours._n_updates == stock._n_updates < 2 * SMALL["n_epochs"]


def test_other_seeds_give_other_weights():
    a, b = (PPO("MlpPolicy", "CartPole-v1", seed=seed, **SMALL).learn(64) for seed in (0, 1))
    assert (weights(a) - weights(b)).abs().max() > 1e-2


@pytest.mark.parametrize(
    "steps, environments, share_of_ends",
    [(1, 1, 1.0), (1, 3, 0.0), (7, 2, 0.3), (200, 5, 0.02), (64, 1, 0.5)],
)
def test_gae_is_that_of_each_episode(steps, environments, share_of_ends):
    draw = np.random.default_rng(steps)
    rewards, values = (draw.normal(size=(steps, environments)).astype(np.float32) for _ in range(2))
    ends = draw.random((steps, environments)) < share_of_ends
    last_values = draw.normal(size=environments).astype(np.float32)
    advantages = gae_of_rollout(rewards, values, ends, last_values, gamma=0.9, lam=0.8)

    expected = np.zeros((steps, environments))
    for e in range(environments):
        carry, next_value = 0.0, float(last_values[e])
        for t in reversed(range(steps)):
            if ends[t, e]:
                carry = next_value = 0.0
            carry = rewards[t, e] + 0.9 * next_value - values[t, e] + 0.9 * 0.8 * carry
            expected[t, e], next_value = carry, values[t, e]
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5)


def test_gae_by_hand():
    # Two episodes in one environment: the first ends with its second step, the second goes on after the rollout.
    column = lambda *numbers: np.array(numbers, np.float32)[:, None]  # noqa: E731
    advantages = gae_of_rollout(
        column(1, 2, 3),
        column(10, 20, 30),
        column(0, 1, 0).astype(bool),
        np.float32([40]),
        gamma=0.5,
        lam=0.5,
    )
    # 3 + 0.5 * 40 - 30 = -7; 2 - 20 = -18; 1 + 0.5 * 20 - 10 + 0.25 * -18 = -3.5
    np.testing.assert_array_equal(advantages, column(-3.5, -18, -7))


def test_learns_cart_pole():
    model = PPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", 4, seed=0),
        learning_rate=2e-3,
        seed=0,
        **{**SMALL, "n_steps": 128},
    )
    before, _ = evaluate_policy(model, model.get_env(), 10, deterministic=False)
    after, _ = evaluate_policy(model.learn(6000), model.get_env(), 10, deterministic=False)
    assert after > before + 50


def test_saves_and_reads_files_of_either_side(tmp_path):
    stock, ours = both(updates=1)
    ours.save(tmp_path / "ours")
    stock.save(tmp_path / "stock")
    for kind, name in ((PPO, "ours"), (PPO, "stock"), (stable_baselines3.PPO, "ours")):
        read = kind.load(tmp_path / name, env=make_vec_env("CartPole-v1", 3, seed=3), device="cpu")
        torch.testing.assert_close(weights(read), weights(ours), rtol=1e-4, atol=2e-6)
        before = weights(read)
        assert not torch.equal(weights(read.learn(64 * 3)), before)
        if kind is PPO:
            assert type(read.rollout_buffer) is RolloutBuffer


def test_a_rollout_buffer_of_ones_own_is_kept():
    class Mine(buffers.RolloutBuffer):
        pass

    assert type(PPO("MlpPolicy", "CartPole-v1", rollout_buffer_class=Mine, **SMALL).rollout_buffer) is Mine
    stock = {"rollout_buffer_class": buffers.RolloutBuffer}
    assert type(PPO("MlpPolicy", "CartPole-v1", **stock, **SMALL).rollout_buffer) is RolloutBuffer


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gamma": 1.5}, "PPO: gamma must be from 0 to 1, got 1.5"),
        ({"gae_lambda": -0.1}, "PPO: gae_lambda must be from 0 to 1, got -0.1"),
        ({"clip_range": 0.0}, "PPO: clip_range must be above 0, got 0.0"),
        ({"clip_range_vf": -1}, "PPO: clip_range_vf must be above 0, got -1"),
        ({"target_kl": 0}, "PPO: target_kl must be above 0, got 0"),
        (
            {"rollout_buffer_class": buffers.ReplayBuffer},
            "rollout_buffer_class must be a subclass of stable_baselines3's RolloutBuffer, got .*ReplayBuffer",
        ),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PPO("MlpPolicy", "CartPole-v1", **SMALL, **settings)


def test_without_stable_baselines3_the_extra_is_named():
    program = """
        import sys
        import fastppo
        assert not {"stable_baselines3", "gymnasium", "torch"} & set(sys.modules)
        sys.modules["stable_baselines3"] = None
        try:
            import fastppo.sb3
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "fastppo.sb3 needs stable-baselines3: pip install 'fastppo[sb3]'"
