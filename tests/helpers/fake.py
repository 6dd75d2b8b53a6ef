"""A sweep that measured nothing: rows, traces and probes of any cell, made up from keyed noise."""

import zlib
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd

from benchmarks.engine.calibration import needs_thresholds
from benchmarks.engine.sweep import Sweep
from benchmarks.spec.cells import OBJECTIVES, ROUNDS, Cell, CellRequest
from benchmarks.spec.model_kinds import LOSSES
from benchmarks.spec.profile import Profile, load_profile

SMOKE = load_profile("smoke")
ROUNDED = 1e-4  # as summaries are written
Effect = Callable[[SimpleNamespace], float]  # of the labels of a cell, as tables have them


@cache
def noise_of(key: str) -> float:
    """Return a standard normal number that depends on the key alone."""
    return np.random.default_rng(zlib.crc32(key.encode())).normal()


class FakeResults(Sweep):
    """Judge scores are noise, shared by all cells as keyed sampling shares it, plus an effect."""

    def __init__(self, profile: Profile, effect: Effect = lambda cell: 0.0) -> None:
        super().__init__(profile)
        self.effect = effect

    def resolve(self, request: CellRequest) -> Cell:
        thresholds = (1.0, 1.1, 1.2) if needs_thresholds(request) else ()
        beta = (4.0, 1.0)[request.replicate] if request.tuned else request.beta
        return request.resolve(beta, thresholds)

    def rows(self, cell: Cell, measurement: str = "rows") -> pd.DataFrame:
        makers = {
            "rows": self._responses,
            "trace": self._tokens,
            "rollouts": self._candidates,
            "view": self._view,
        }
        return makers[measurement](cell)

    def _places(self, cell: Cell) -> pd.DataFrame:
        evaluation = self.profile.evaluation
        shape = (
            len(OBJECTIVES),
            cell.prompts or evaluation.prompts_per_objective,
            evaluation.samples,
        )
        places = pd.DataFrame(list(np.ndindex(shape)), columns=["objective", "prompt", "seed"])
        return places.assign(objective=np.array(OBJECTIVES)[places["objective"]])

    def _responses(self, cell: Cell) -> pd.DataFrame:
        places = self._places(cell)
        keys = [f"{cell.replicate} {p.objective} {p.prompt} {p.seed}" for p in places.itertuples()]
        noise = np.array([noise_of(key) for key in keys])
        frames, thresholds = [], set(vars(cell).get("thresholds", ()))
        labels = vars(cell) | {
            "model": str(cell.model),
            "value_model": str(cell.scorer or ""),
            "threshold": thresholds.pop() if len(thresholds) == 1 else None,
        }
        effect = self.effect(SimpleNamespace(**labels))
        searches = cell.search == "best-of"
        for best_of in [2**i for i in range(cell.responses.bit_length())] if searches else [1]:
            share = cell.target_ratio if cell.gate != "never" else 0.0
            decoded = best_of if searches else cell.responses
            frames.append(
                places.assign(
                    best_of=best_of,
                    judge=noise + effect,
                    reward=noise / 2,
                    fluency_errors=noise < 0,
                    kl=3 * share,
                    training_reward=noise / 3,
                    surprise=20.0,
                    distinct=0.8,
                    tokens=20,
                    steered=int(20 * share),
                    shifted=1,
                    finished=True,
                    forwards=20 * decoded,
                    junctions=int(20 * share) * decoded,
                    model_tokens=30 * decoded,
                    value_tokens=int(200 * share),
                    megaflops=5.0 * decoded,
                )
            )
        return pd.concat(frames, ignore_index=True)

    def _tokens(self, cell: Cell) -> pd.DataFrame:
        rng, frames = np.random.default_rng(cell.replicate), []
        for place in self._places(cell).itertuples():
            n = int(rng.integers(3, 12))
            entropy = rng.uniform(0, 2.3, n).astype(np.float32)
            tokens = rng.integers(6, 60, n)
            steered = entropy >= 1.0 if cell.gate != "never" else np.zeros(n, bool)
            frames.append(
                pd.DataFrame(
                    {
                        "objective": place.objective,
                        "prompt": np.int16(place.prompt),
                        "seed": np.int8(place.seed),
                        "step": np.arange(n, dtype=np.int16),
                        "token_ids": tokens,
                        "entropy": entropy,
                        "steered": steered,
                        "base_token": np.where(steered & (rng.random(n) < 0.5), 7, tokens),
                        **{
                            name: rng.random(n) / 9
                            for name in ("divergence_mean", "divergence_token")
                        },
                        **{name: 1 + rng.random(n) for name in ("range_mean", "range_token")},
                        **(self._foresight(n, place.prompt) if cell.gate == "never" else {}),
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def _foresight(self, n: int, prompt: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(prompt)
        names = ("predicted", "q_head", "other_beta", "shift")
        columns = {f"{name}_{loss}": rng.random(n) for name in names for loss in LOSSES}
        unseen = rng.random(n) if prompt % 4 == 0 else np.full(n, np.nan)
        columns |= {f"unseen_{loss}": unseen for loss in LOSSES}
        return columns | {"attention": rng.random(n)}

    def _candidates(self, cell: Cell) -> pd.DataFrame:
        rng, frames = np.random.default_rng(cell.replicate), []
        for objective in OBJECTIVES:
            for state in range(self.profile.sweep.probes):
                logits = rng.normal(size=self.profile.decoding.candidates) * rng.uniform(0, 4)
                likelihood = logits - np.log(np.exp(logits).sum())
                worth = rng.normal(size=len(logits))
                frames.append(
                    pd.DataFrame(
                        {
                            "objective": objective,
                            "prompt": 0,
                            "state": state,
                            "step": 3,
                            "entropy": -(np.exp(likelihood) * likelihood).sum(),
                            "rank": np.arange(len(logits)),
                            "base_logprob": likelihood,
                            "value_mean": worth + rng.normal(size=len(logits)),
                            "value_token": worth,
                            "worth": worth,
                            "worth_error": 0.0,
                        }
                    )
                )
        return pd.concat(frames, ignore_index=True)

    def _view(self, cell: Cell) -> pd.DataFrame:
        rng, frames, count = np.random.default_rng(cell.replicate), [], 4
        for place in self._places(cell).query("prompt < 2 and seed == 0").itertuples():
            n = 20
            logits, values = rng.normal(size=(n, count)), rng.normal(size=(n, count))
            policies = {"base_logprob": logits, "tilted": logits + (cell.gate != "never") * values}
            steered, taken = rng.random(n) < cell.target_ratio, rng.integers(count, size=n)
            unsteered = np.where(steered, rng.integers(count, size=n), taken)
            frames.append(
                pd.DataFrame(
                    {
                        "objective": place.objective,
                        "prompt": np.int16(place.prompt),
                        "seed": np.int8(0),
                        "asked": f"<question> {place.prompt} ?",
                        "step": np.repeat(np.arange(n, dtype=np.int16), count),
                        "rank": np.tile(np.arange(count, dtype=np.int8), n),
                        "word": [f"w{i}" for i in rng.integers(50, size=n * count)],
                        "entropy": np.repeat(rng.uniform(0, 1.4, n), count),
                        "steered": np.repeat(steered, count),
                        "chosen": (np.arange(count) == taken[:, None]).flatten(),
                        "unsteered": (np.arange(count) == unsteered[:, None]).flatten(),
                        **{
                            name: (x - np.log(np.exp(x).sum(1, keepdims=True))).flatten()
                            for name, x in policies.items()
                        },
                        "value": values.flatten() if cell.gate != "never" else np.nan,
                        **{
                            name: np.repeat(rng.random(n), count)
                            for name in ("divergence", "predicted")
                        },
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def timings(self, cells) -> pd.DataFrame:
        frames = []
        for number, cell in enumerate(cells):
            best_of = cell.responses if cell.search == "best-of" else 1
            labels = cell.labels() | {"best_of": best_of}
            frames.append(
                pd.DataFrame({"prompt": range(ROUNDS), "seconds": 0.1 * (number + 1)}).assign(
                    **labels
                )
            )
        return pd.concat(frames, ignore_index=True)


def table_of(
    module,
    effect: Effect = lambda cell: 0.0,
    replicates: int = 2,
    profile: Profile = SMOKE,
) -> pd.DataFrame:
    """Return the summary of a figure from shuffled made-up rows."""
    rows = module.collect(profile, range(replicates), FakeResults(profile, effect))
    return module.summarize(rows.sample(frac=1, random_state=0), profile)


def pick(table: pd.DataFrame, **labels) -> pd.Series:
    """Return the only row with these labels, over all replicates; empty equals missing."""
    rows = table
    for name, value in ({"replicate": "all"} | labels).items():
        values = rows[name]
        empty = values.isna() | (values == "")
        rows = rows[empty if value in (None, "") else values == value]
    assert len(rows) == 1, rows
    return rows.iloc[0]


def ends(row: pd.Series) -> list[float]:
    return [row["estimate"], row["low"], row["high"]]
