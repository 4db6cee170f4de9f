"""Sampling at equal network calls, against every scheduler of diffusers, and what a step costs outside the network.

    python benchmarks/samplers.py --json
    python benchmarks/samplers.py --run runs/quickstart --json
    python benchmarks/samplers.py --run runs/quickstart --only-run --pictures 8 --calls 5 10 20

The problem has an exact answer: a mixture of ten Gaussians with whole covariances, fitted to scikit-learn's digits (64
dimensions), whose score and ODE are known. An error is the root mean square distance of a sample to where the ODE ends
that starts at the same noise; the median over 256 noises is compared with that of the best of all diffusers schedulers
and spacings with as many calls. With --run also on a trained model, whose own 1,000-step solution is the reference: the
table's 1,000 times, each once, ending with the jump from its least noise that every scheduler ends with. (A trained
network's ODE has no limit at the data: x0-hat(x) - x does not vanish there as it should, so x moves on by as much with
every factor e of the noise. References that end at different noises differ by 0.05, and rank samplers at random.)
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor

from sfumato.bench import cost
from sfumato.catalogue import build
from sfumato.config import SamplingSection
from sfumato.denoiser import Bound
from sfumato.exact import FullMixture
from sfumato.grids import logistic, trailing, uniform_log_snr
from sfumato.paths import Tabulated
from sfumato.samplers import drive
from sfumato.samplers.core import Running
from sfumato.samplers.ddim import ddim
from sfumato.samplers.dpm_solver import dpmpp_2m
from sfumato.samplers.learned import learned
from sfumato.samplers.unipc import unipc
from sfumato.settings import fitted_grid
from sfumato.tuning import Problem, tune

CALLS, TUNED = (5, 8, 10, 15, 20, 30), (5, 8, 10, 15)
Denoise = Callable[[Tensor, float | Tensor], Tensor]


def by_default(path: Tabulated, noise: Tensor, calls: int, side: tuple[int, int] = (8, 8)) -> Running:
    """What the library does where nothing is said, for pictures of this size."""
    section = SamplingSection()
    grid = build(fitted_grid(section.grid, *side), "Grid")
    return build(section.sampler, "Sampler")(path, noise, grid(path, calls))  # type: ignore[no-any-return]


def digits() -> FullMixture:
    """The mixture, in [-1, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.mixture import GaussianMixture

    found = GaussianMixture(10, covariance_type="full", reg_covar=1e-3, random_state=0).fit(load_digits().data / 8 - 1)
    return FullMixture(*(torch.from_numpy(part) for part in (found.weights_, found.means_, found.covariances_)))


def errors(result: Tensor, reference: Tensor) -> dict[str, float]:
    """The median and the 90th percentile of the samples' distances."""
    each = (result - reference).flatten(1).square().mean(1).sqrt()
    return {"median": float(each.median()), "p90": float(each.quantile(0.9))}


def peers() -> Iterator[tuple[str, Any, int]]:
    """Every deterministic scheduler of diffusers for noise-predicting models, with each spacing: name, maker, calls."""
    import diffusers as d

    common = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
    spacings = [{"timestep_spacing": one} for one in ("leading", "linspace", "trailing")]
    sigmas: list[dict[str, Any]] = [{f"use_{one}_sigmas": True} for one in ("karras", "exponential", "beta")]
    lu = [{"use_lu_lambdas": True}]

    def made(kind: Any, calls: int, options: list[dict[str, Any]], **fixed: Any) -> Iterator[tuple[str, Any, int]]:
        for option in options:
            said = ", ".join(f"{k}={v}" for k, v in (fixed | option).items())
            yield f"{kind.__name__}({said})", lambda o=option: kind(**common, **fixed, **o), calls

    yield from made(d.DDIMScheduler, 1, spacings, clip_sample=False, set_alpha_to_one=True)
    yield from made(d.PNDMScheduler, 1, spacings, skip_prk_steps=True, set_alpha_to_one=True)
    yield from made(d.EulerDiscreteScheduler, 1, spacings + sigmas)
    yield from made(d.LMSDiscreteScheduler, 1, spacings + sigmas)
    yield from made(d.HeunDiscreteScheduler, 2, spacings + sigmas)
    yield from made(d.KDPM2DiscreteScheduler, 2, spacings + sigmas)
    for order in (1, 2, 3):
        yield from made(d.DEISMultistepScheduler, 1, spacings + sigmas, solver_order=order)
        yield from made(d.DPMSolverSinglestepScheduler, 1, [{}, *sigmas], solver_order=order)
        for kind in ("bh1", "bh2"):
            yield from made(d.UniPCMultistepScheduler, 1, spacings + sigmas, solver_order=order, solver_type=kind)
        for algorithm in ("dpmsolver++", "dpmsolver"):
            for solver in ("midpoint", "heun") if order == 2 else ("midpoint",):
                fixed = {"solver_order": order, "algorithm_type": algorithm, "solver_type": solver}
                last = {"final_sigmas_type": "zero" if algorithm == "dpmsolver++" else "sigma_min"}
                yield from made(d.DPMSolverMultistepScheduler, 1, spacings + sigmas + lu, **fixed, **last)


@torch.no_grad()
def peer_result(scheduler: Any, noise: Tensor, path: Tabulated, denoise: Denoise, steps: int) -> tuple[Tensor, int]:
    """What a diffusers scheduler makes of the same noise and model, used as its documentation says; and the calls."""
    scheduler.set_timesteps(steps)
    x, calls = noise * scheduler.init_noise_sigma, 0
    for index in scheduler.timesteps:
        t = path.at(index.double().cpu())
        seen = scheduler.scale_model_input(x, index)
        x0 = denoise(seen, float(t))
        eps = (seen - float(path.alpha(t)) * x0) / float(path.sigma(t))
        x = scheduler.step(eps, index, x).prev_sample
        calls += 1
    return x, calls


def best_peers(
    noise: Tensor, path: Tabulated, denoise: Denoise, reference: Tensor, budgets: Sequence[int] = CALLS
) -> dict[int, dict[str, Any]]:
    """For each number of calls the scheduler with the least median error. Combinations that raise are named."""
    best: dict[int, dict[str, Any]] = {}
    for name, make, per_step in peers():
        for calls in budgets:
            steps = calls // per_step + (calls % per_step if per_step > 1 else 0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result, used = peer_result(make(), noise, path, denoise, steps)
            except (ValueError, IndexError, RuntimeError, AssertionError, NotImplementedError) as error:
                _say(f"not run: {name} at {calls}: {type(error).__name__} {str(error).splitlines()[0][:80]}")
                continue
            if used > calls:
                result, used = _fewer(make, noise, path, denoise, steps, calls)
            found = errors(result, reference)
            if used <= calls and found["median"] < best.get(calls, {"median": float("inf")})["median"]:
                best[calls] = {**found, "by": name}
    return best


def _fewer(
    make: Callable[[], Any], noise: Tensor, path: Tabulated, denoise: Denoise, steps: int, calls: int
) -> tuple[Tensor, int]:
    """With fewer steps, until the calls suffice (PNDM and two-call methods use more than they say)."""
    for fewer in range(steps - 1, 0, -1):
        result, used = peer_result(make(), noise, path, denoise, fewer)
        if used <= calls:
            return result, used
    return torch.full_like(noise, torch.inf), 0


def frontier(seconds: Callable[[], float]) -> dict[str, Any]:
    """Ours against the best of theirs on the mixture: ratios of medians."""
    path, mixture, rng = Tabulated(), digits(), torch.Generator().manual_seed(0)
    noise, held, fresh = (torch.randn(n, 64, generator=rng, dtype=torch.float64) for n in (256, 128, 128))
    exact = mixture.denoiser(path)
    reference = mixture.flow(path, noise, 1.0, 0.0)
    _say(f"reference solved, {seconds():.0f} s")
    theirs = best_peers(noise, path, exact, reference)
    _say(f"diffusers done, {seconds():.0f} s")
    rows: dict[str, Any] = {"untrained": {}, "tuned": {}, "p90": {"untrained": {}, "tuned": {}}, "peers": theirs}
    rows["errors"] = {"untrained": {}, "tuned": {}}
    with torch.no_grad():
        for calls in CALLS:
            result = drive(by_default(path, noise, calls), exact)
            _add(rows, "untrained", calls, errors(result, reference), theirs[calls])
    for calls in TUNED:
        found = tune([Problem(fresh, exact)], [Problem(held, exact)], calls)
        times = torch.tensor(found.times, dtype=torch.float64)
        with torch.no_grad():
            result = drive(learned(path, noise, times, rows=found.rows), exact)
        _add(rows, "tuned", calls, errors(result, reference), theirs[calls])
        _say(f"{calls} calls tuned, {seconds():.0f} s")
    with torch.no_grad():
        few = noise[:32]
        rows["floor"] = {
            str(calls): errors(drive(by_default(path, few, calls), exact), reference[:32])["median"]
            for calls in (50, 100, 200, 400)
        }
    return rows


def _add(rows: dict[str, Any], kind: str, calls: int, ours: dict[str, float], theirs: dict[str, Any]) -> None:
    rows[kind][str(calls)] = round(ours["median"] / theirs["median"], 4)
    rows["p90"][kind][str(calls)] = round(ours["p90"] / theirs["p90"], 4)
    rows["errors"][kind][str(calls)] = ours


def overhead(steps: int = 50, rounds: int = 15) -> dict[str, Any]:
    """Microseconds of CPU time a step outside the network, ours and diffusers', A/B interleaved: batch 1, 4x64x64."""
    import diffusers as d

    path, x = Tabulated("scaled_linear"), torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    answer = torch.randn_like(x)
    times = logistic(path, steps)
    common = {"beta_start": 8.5e-4, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pairs: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
        "ddim": (ddim, lambda: d.DDIMScheduler(**common, clip_sample=False)),
        "dpmpp_2m": (dpmpp_2m, lambda: d.DPMSolverMultistepScheduler(**common)),
        "unipc": (lambda *a: unipc(*a, order=2), lambda: d.UniPCMultistepScheduler(**common)),
    }
    rows = {}
    for name, (ours, theirs) in pairs.items():
        spent: tuple[list[float], list[float]] = [], []
        for _ in range(rounds):
            us, operations, waits = cost(lambda: ours(path, x, times), answer, steps)  # noqa: B023
            spent[0].append(us)
            scheduler = theirs()
            scheduler.set_timesteps(steps)
            started = time.process_time()
            state = x
            for t in scheduler.timesteps:
                state = scheduler.step(answer, t, state).prev_sample
            spent[1].append((time.process_time() - started) / steps * 1e6)
        middle = [sorted(part)[len(part) // 2] for part in spent]
        rows[name] = {
            "us": round(middle[0], 2),
            "diffusers_us": round(middle[1], 2),
            "ratio": round(middle[0] / middle[1], 3),
            "operations_a_step": operations,
            "waits": waits,
        }
    return rows


def on_run(
    run: Path, seconds: Callable[[], float], n: int, budgets: Sequence[int], guidance: float | None, seed: int
) -> dict[str, Any]:
    """The default against diffusers' best through a trained network, reference its own 1,000-step solution."""
    from sfumato import load
    from sfumato.data.scenes import TASKS, prompts
    from sfumato.denoiser import on_path
    from sfumato.guidance import guided

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))  # nothing is timed any more
    pipeline = load(run, "cpu")
    settings, said = (
        pipeline.settings(guidance=guidance),
        [c.text for task in TASKS for c in prompts(task, -(-n // len(TASKS)), seed=seed)][:n],
    )
    cond = pipeline.model.cond([{"caption": text} for text in said])
    guide = settings.guide(cond, lambda: pipeline.model.cond([{}] * n))
    path = Tabulated()
    answer = on_path(guided(pipeline.model, pipeline.model.denoiser.path, guide), path)

    def denoise(x: Tensor, t: float | Tensor) -> Tensor:
        return answer(x.float(), t).to(x.dtype)

    shape = pipeline.model.codec.shape(*pipeline.model.size)
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        reference = drive(dpmpp_2m(path, noise, trailing(path, 1000)), Bound(path, denoise))
        again = drive(unipc(path, noise, uniform_log_snr(path, 1000)), Bound(path, denoise))
        agreement = errors(again, reference)["median"]
        _say(f"reference of the run solved, {seconds():.0f} s; UniPC on another grid agrees to {agreement:.1e}")
        theirs = best_peers(noise, path, denoise, reference, budgets)
        ratios, ours = {}, {}
        for calls in budgets:
            result = drive(by_default(path, noise, calls, shape[1:]), Bound(path, denoise))
            ours[str(calls)] = errors(result, reference)
            ratios[str(calls)] = round(ours[str(calls)]["median"] / theirs[calls]["median"], 4)
    told = {"guidance": settings.guidance, "pictures": n, "seed": seed, "reference_agrees_to": agreement}
    return {"untrained": ratios, "errors": ours, "peers": theirs, **told}


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    options = argparse.ArgumentParser(description="Samplers against diffusers' at equal calls, and their overhead.")
    options.add_argument("--run", type=Path, help="also compare on this trained run")
    options.add_argument("--only-run", action="store_true", help="nothing but the trained run")
    options.add_argument("--pictures", type=int, default=16, help="of the trained run")
    options.add_argument("--calls", type=int, nargs="+", default=CALLS, help="of the trained run")
    options.add_argument("--guidance", type=float, help="of the trained run [its own]")
    options.add_argument("--seed", type=int, default=0, help="of the trained run's prompts and noise")
    options.add_argument("--results", type=Path, help="where to keep the numbers")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    if chosen.only_run and not chosen.run:
        options.error("--only-run needs --run")
    rows: dict[str, Any] = {"machine": machine()}
    if not chosen.only_run:
        rows |= {"frontier": frontier(lambda: time.perf_counter() - began), "overhead": overhead()}
    if chosen.run:
        rows["run"] = on_run(
            chosen.run,
            lambda: time.perf_counter() - began,
            chosen.pictures,
            chosen.calls,
            chosen.guidance,
            chosen.seed,
        )
        print("on the run", rows["run"]["untrained"], file=sys.stderr)
    name = "samplers-run.json" if chosen.only_run else "samplers.json"
    results = chosen.results or Path(__file__).parent / "results" / name
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if chosen.json:
        print(json.dumps(rows))
        return
    for kind in () if chosen.only_run else ("untrained", "tuned"):
        print(f"{kind:<10}", "  ".join(f"{calls}: {ratio:.2f}" for calls, ratio in rows["frontier"][kind].items()))
    for name, row in rows.get("overhead", {}).items():
        print(f"{name:<10}", row)


if __name__ == "__main__":
    main()
