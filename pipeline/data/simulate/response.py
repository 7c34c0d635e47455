"""From interests and ads to probabilities and outcomes: the truth of every log.

For a candidate i that user u sees on surface s in context x, with the interest v [D] of `users.py`:

    strength   = v . a_i + relevance * (match(x, i) - 0.35) + trend_day . a_i
    click      = sigmoid(b0_s + bias_us + q_si + strength + context effects)
    long_click = sigmoid(b1_s + 0.7 strength + r_si), given a click
    save       = click * sigmoid(z + 1) + (1 - click) * sigmoid(z - 1),
                 z = b2_s + 0.7 v_long . a_i + 0.5 strength + 0.5 q_si
    hide       = (1 - click) * sigmoid(b3_s - 0.8 strength - q_si)

Letters: C candidates of a step, S surfaces, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.simulate.config import SimulationConfig
from pipeline.data.simulate.schema import CLICK, HIDE, LONG_CLICK, SAVE, TASKS
from pipeline.data.simulate.world import Array

SAVE_IF_CLICKED = 1.0  # logits by which a click raises, and no click lowers, a save
# What an outcome adds to the user's interest in such ads; seeing an ad without any action wears it out a little.
SEEN_WEIGHT = -0.09
ACTION_WEIGHT = {CLICK: 0.3, LONG_CLICK: 0.25, SAVE: 0.5, HIDE: -0.7}


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def effect_of(happened: Array) -> Array:
    """[C] weight by which events move the user's interest, from what happened [C, T]."""
    return SEEN_WEIGHT + happened @ np.array([ACTION_WEIGHT[t] for t in range(len(TASKS))])


@dataclass(frozen=True, kw_only=True)
class Logits:
    """[C] each, without the surfaces' intercepts; see the head of this file."""

    click: Array
    long_click: Array
    save: Array
    hide: Array

    def conditionals(self, intercept: Array) -> tuple[Array, Array, Array, Array, Array]:
        """Click; long click if clicked; save if clicked, if not; hide if not clicked. `intercept`: [C, T]."""
        save = intercept[:, SAVE] + self.save
        return (
            sigmoid(intercept[:, CLICK] + self.click),
            sigmoid(intercept[:, LONG_CLICK] + self.long_click),
            sigmoid(save + SAVE_IF_CLICKED),
            sigmoid(save - SAVE_IF_CLICKED),
            sigmoid(intercept[:, HIDE] + self.hide),
        )


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What happened.

    Args:
        truth: float32 [C, T] probabilities of the logged labels; of a long click given a click.
        label: float32 [C, T] logged labels, NaN = not observed (a long click without a click).
        effect: float32 [C] weight by which each event moves the user's interest; of what truly happened.
    """

    truth: Array
    label: Array
    effect: Array


def respond(config: SimulationConfig, logits: Logits, intercept: Array, rng: np.random.Generator) -> Outcomes:
    """Probabilities, and a draw from them.

    Args:
        config: for `label_noise`.
        logits: [C] each.
        intercept: [C, T] intercepts of each candidate's surface.
        rng: where the draws come from.
    """
    click, long_click, save_clicked, save_not, hide_not = logits.conditionals(intercept)
    truth = np.empty((click.size, len(TASKS)))
    truth[:, CLICK] = click
    truth[:, LONG_CLICK] = long_click
    truth[:, SAVE] = click * save_clicked + (1 - click) * save_not
    truth[:, HIDE] = (1 - click) * hide_not
    uniform = rng.random((click.size, len(TASKS)))
    happened = np.empty((click.size, len(TASKS)), dtype=bool)
    clicked = uniform[:, CLICK] < click
    happened[:, CLICK] = clicked
    happened[:, LONG_CLICK] = clicked & (uniform[:, LONG_CLICK] < long_click)
    happened[:, SAVE] = uniform[:, SAVE] < np.where(clicked, save_clicked, save_not)
    happened[:, HIDE] = ~clicked & (uniform[:, HIDE] < hide_not)
    effect = effect_of(happened)
    if config.label_noise > 0:
        truth = truth * (1 - 2 * config.label_noise) + config.label_noise
        logged = happened ^ (rng.random(happened.shape) < config.label_noise)
        # Where noise made a click, there is a long click to be reported too.
        invented = logged[:, CLICK] & ~clicked
        logged[invented, LONG_CLICK] = rng.random(int(invented.sum())) < truth[invented, LONG_CLICK]
    else:
        logged = happened
    label = logged.astype(np.float32)
    label[~logged[:, CLICK], LONG_CLICK] = np.nan
    return Outcomes(truth=truth.astype(np.float32), label=label, effect=effect.astype(np.float32))


def calibrated_intercepts(config: SimulationConfig, logits: Logits, surface: Array) -> Array:
    """[S, T] intercepts at which the mean probabilities of a sample are the rates that the knobs ask for.

    Args:
        config: for the rates.
        logits: of a sample of candidates.
        surface: [C] their surfaces, each of which occurs.
    """
    result = np.zeros((len(config.surfaces), len(TASKS)))
    for index, knobs in enumerate(config.surfaces):
        at = surface == index
        one = np.ones(int(at.sum()))
        b = result[index]
        b[CLICK] = _solve(logits.click[at], one, knobs.click_rate)
        click = sigmoid(b[CLICK] + logits.click[at])
        b[LONG_CLICK] = _solve(logits.long_click[at], click, config.long_click_rate)
        save = np.concatenate([logits.save[at] + SAVE_IF_CLICKED, logits.save[at] - SAVE_IF_CLICKED])
        b[SAVE] = _solve(save, np.concatenate([click, 1 - click]), config.save_rate)
        not_clicked = float((1 - click).mean())
        b[HIDE] = _solve(logits.hide[at], 1 - click, min(config.hide_rate / not_clicked, 0.9))
    return result


def _solve(logits: Array, weight: Array, wanted: float) -> float:
    """The intercept with which the weighted mean probability is `wanted`, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(24):
        middle = (low + high) / 2
        if np.average(sigmoid(middle + logits), weights=weight) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
