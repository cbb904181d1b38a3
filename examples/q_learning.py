"""The smallest dialogue that can be learned: tabular Q-learning, and PPO on the same task.

A dialogue starts, asks, answers: states start → ask → answer → start. Each turn is yes, which moves it on, or no, which
stays. Reaching start is worth 0, ask -1 (a question costs the user a turn), answer +1. So the best dialogue asks once,
answers, and goes on answering. After ten turns it is cut.

    python -m examples.q_learning --alpha 0.01 --gamma 0.9 --episodes 1000
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.env_util import make_vec_env

from fastppo.sb3 import PPO

STATES, ACTIONS = ("start", "ask", "answer"), ("yes", "no")
REWARDS = (0.0, -1.0, 1.0)  # of reaching a state


class DialogueEnv(gymnasium.Env[np.int64, np.int64]):
    """The dialogue, of at most `turns` turns."""

    def __init__(self, turns: int = 10) -> None:
        self.observation_space = gymnasium.spaces.Discrete(len(STATES))
        self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))
        self.turns = turns
        self.state, self.turn = 0, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.int64, dict[str, Any]]:
        super().reset(seed=seed)
        self.state, self.turn = 0, 0
        return np.int64(self.state), {}

    def step(self, action: np.int64) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        if ACTIONS[action] == "yes":
            self.state = (self.state + 1) % len(STATES)
        self.turn += 1
        return np.int64(self.state), REWARDS[self.state], False, self.turn == self.turns, {}


class Turn(NamedTuple):
    """One turn, and what Q-learning made of it."""

    state: int
    action: int
    reward: float
    next_state: int
    before: float
    after: float


def q_learning(
    env: DialogueEnv, episodes: int, alpha: float, gamma: float, epsilon: float, seed: int = 0
) -> tuple[np.ndarray, list[Turn]]:
    """Q[s, a] += alpha (r + gamma max Q[s', ·] - Q[s, a]), exploring with probability epsilon.

    Returns:
        Q, (states, actions), and the turns of the first episode.
    """
    draw = np.random.default_rng(seed)
    q = np.zeros((len(STATES), len(ACTIONS)))
    first_episode: list[Turn] = []
    for episode in range(episodes):
        state, ended = env.reset()[0], False
        while not ended:
            explores = draw.random() < epsilon
            best = np.flatnonzero(q[state] == q[state].max())
            action = np.int64(draw.integers(len(ACTIONS)) if explores else draw.choice(best))
            next_state, reward, _, ended, _ = env.step(action)
            before = q[state, action]
            # The end is a cut, not a goal: what the next state is worth counts there, too.
            q[state, action] += alpha * (reward + gamma * q[next_state].max() - before)
            if episode == 0:
                after = q[state, action]
                first_episode.append(Turn(int(state), int(action), reward, int(next_state), before, after))
            state = next_state
    return q, first_episode


def exact_q(gamma: float) -> np.ndarray:
    """What Q converges to, by value iteration."""
    q = np.zeros((len(STATES), len(ACTIONS)))
    to = np.array(
        [[(state + (action == "yes")) % len(STATES) for action in ACTIONS] for state in range(len(STATES))]
    )
    for _ in range(10_000):
        q = np.take(REWARDS, to) + gamma * q.max(1)[to]
    return q


def train_ppo(steps: int, gamma: float, seed: int = 0) -> PPO:
    env = make_vec_env(DialogueEnv, n_envs=8, seed=seed)
    model = PPO(
        *("MlpPolicy", env),
        learning_rate=3e-3,
        n_steps=32,
        n_epochs=4,
        gamma=gamma,
        ent_coef=0.01,
        policy_kwargs={"net_arch": [16]},
        seed=seed,
        device="cpu",
    )
    return model.learn(steps)


def walk(policy: list[int], env: DialogueEnv) -> tuple[list[str], float]:
    """The states that a policy visits, and its return."""
    state, total, ended = int(env.reset()[0]), 0.0, False
    visited = [STATES[state]]
    while not ended:
        next_state, reward, _, ended, _ = env.step(np.int64(policy[state]))
        state, total = int(next_state), total + reward
        visited.append(STATES[state])
    return visited, total


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--alpha", type=float, default=0.01, help="learning rate of Q-learning")
    parser.add_argument("--gamma", type=float, default=0.9, help="discount per turn")
    parser.add_argument("--episodes", type=int, default=1000, help="dialogues of Q-learning")
    parser.add_argument("--epsilon", type=float, default=0.2, help="probability of a random turn")
    parser.add_argument("--ppo-steps", type=int, default=8192, help="turns of PPO")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    env, console = DialogueEnv(), Console()

    q, first_episode = q_learning(
        env, options.episodes, options.alpha, options.gamma, options.epsilon, options.seed
    )
    trace = Table(
        "state", "action", "reward", "next", "Q before", "Q after", title="The first dialogue, turn by turn"
    )
    for turn in first_episode:
        trace.add_row(
            STATES[turn.state],
            ACTIONS[turn.action],
            f"{turn.reward:+.0f}",
            STATES[turn.next_state],
            f"{turn.before:.4f}",
            f"{turn.after:.4f}",
        )
    console.print(trace)

    model = train_ppo(options.ppo_steps, options.gamma, options.seed)
    observations, _ = model.policy.obs_to_tensor(np.arange(len(STATES)))
    probabilities = model.policy.get_distribution(observations).distribution.probs.detach().numpy()  # type: ignore
    exact = exact_q(options.gamma)
    table = Table("state", "action", "Q learned", "Q exact", "PPO's probability")
    for s, a in np.ndindex(q.shape):
        table.add_row(
            STATES[s], ACTIONS[a], f"{q[s, a]:.2f}", f"{exact[s, a]:.2f}", f"{probabilities[s, a]:.3f}"
        )
    console.print(table)

    result: dict[str, Any] = {"q": q, "exact": exact}
    for name, scores in (("Q-learning", q), ("PPO", probabilities)):
        visited, total = walk([int(a) for a in scores.argmax(1)], env)
        result[name] = total
        console.print(f"{name}: {' → '.join(visited[:4])} …; return {total:g}")
    return result


if __name__ == "__main__":
    main()
