"""A plausible `results.json` with its side files, as a simulated run would leave them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

N_TEST = 200
IDS = [f"person-{i:05d}" for i in range(N_TEST)]
CONFOUNDS, FEATURES, EMBEDDINGS = "confounds only", "brainjepa features", "brain embedding"


def write_example(workspace: Path, *, effect: float = 1.4, seed: int = 0) -> dict[str, Any]:
    """Write results.json, metrics, the similarity arrays and a features file with subject ids.

    Args:
        workspace: The folder to fill.
        effect: Separation of pairs from non-pairs in standard deviations; 0 is the null.
        seed: For the arrays.
    """
    rng = np.random.default_rng(seed)
    ranks = _write_arrays(workspace, rng, effect)
    _write_metrics(workspace, rng, effect)
    features = workspace / "features" / "brainjepa.parquet"
    features.parent.mkdir(parents=True)
    pl.DataFrame({"subject": IDS}).write_parquet(features)
    results = {
        "format": 1,
        "package_version": "0.1.0",
        "created": "2026-11-21T19:40:00+00:00",
        "cohort": cohort_facts(),
        "config": {
            "align": {"steps": 400, "learning_rate": 1e-3, "n_negatives": None, "symmetric": True},
            "seeds": list(range(40)),
        },
        "pretraining": {
            "brainjepa": {
                "metrics": "pretrain/brainjepa/metrics.jsonl",
                "n_steps": 400,
                "seconds": 71.3,
                "final_loss": 0.112,
                "first": {"validation_loss": 0.45, "loss_of_mean_target": 0.22},
                "last": {"validation_loss": 0.12, "loss_of_mean_target": 0.34},
            },
            "brainlm": {
                "metrics": "pretrain/brainlm/metrics.jsonl",
                "n_steps": 400,
                "n_parameters": 109_948,
                "first": {"validation_loss": 1.7, "masked_r2": -0.62},
                "last": {"validation_loss": 0.61, "masked_r2": 0.37},
            },
        },
        "alignment": {
            "brain": "brainjepa",
            "dna": "evo2",
            "metrics": "align/brainjepa-evo2/metrics.jsonl",
            "n_train": 700,
            "n_validation": 100,
            "n_test": N_TEST,
            "best_step": 240,
            "loss": 4.31,
            "log_n": float(np.log(256)),
            "logit_scale": 17.2,
            "effective_rank": 21.7,
            "columns": {"brain": {"given": 6400, "used": 128, "variance_kept": 0.53}},
            "residualised_on": ["age", "sex=M", "site=2", "motion"],
        },
        "truth": truth(effect),
        "figures": {"similarity": "align/brainjepa-evo2/similarity.npz"},
        "retrieval": retrieval(ranks, effect),
        "probes": probes(effect),
        "cca": cca(effect),
        "attribution": attribution(effect),
        "stages": [
            {"name": "simulate", "seconds": 8.2, "peak_mib": 612.0, "cached": False},
            {"name": "pretrain brainjepa", "seconds": 71.3, "peak_mib": 905.0, "cached": False},
            {"name": "embed", "seconds": 12.9, "peak_mib": 780.0, "cached": False},
            {"name": "align", "seconds": 31.0, "peak_mib": 560.0, "cached": False},
            {"name": "retrieve", "seconds": 6.4, "peak_mib": 540.0, "cached": True},
            {"name": "probe", "seconds": 14.1, "peak_mib": 498.0, "cached": False},
        ],
    }
    save(workspace, results)
    return results


def save(workspace: Path, results: dict[str, Any]) -> None:
    """Write results.json."""
    (workspace / "results.json").write_text(json.dumps(results, allow_nan=False), encoding="utf-8")


def cohort_facts() -> dict[str, Any]:
    """The facts of `Cohort.describe()`, with splits and flow."""
    return {
        "name": "demo",
        "origin": "simulated",
        "n_people": 1000,
        "n_recordings": 1900,
        "n_parcels": 100,
        "n_trs": [160, 160],
        "tr_s": [0.735],
        "sites": {"site-1": 402, "site-2": 331, "site-3": 267},
        "sex": {"F": 517, "M": 483},
        "age": {"mean": 63.4, "sd": 7.5},
        "motion": {"mean": 0.131, "sd": 0.049},
        "families": {"n_families": 871, "n_with_relatives": 240, "largest": 3},
        "splits": {"train": 700, "validation": 100, "test": 200, "hash": "3f1d9a0c55e27b64"},
        "flow": [
            {"step": "people in the cohort", "n": 1040},
            {"step": "with a recording of at least 100 TRs", "n": 1012},
            {"step": "with DNA embeddings", "n": 1000},
            {"step": "in a table but not in the cohort", "n": 7},
        ],
    }


def direction(ranks: np.ndarray, *, p_value: float, attainable: float | None) -> dict[str, Any]:
    """One direction's row from the share of others that each person's partner outranks [n]."""
    n = len(ranks)
    auc, error = float(ranks.mean()), float(ranks.std() / np.sqrt(n))
    position = (1 - ranks) * (n - 1) + 1
    row = {
        "auc": auc,
        "ci_low": auc - 1.96 * error,
        "ci_high": auc + 1.96 * error,
        "p_value": p_value,
        "chance": 0.5,
        "n_queries": n,
        "n_gallery": n,
        "attainable": attainable,
        "attainable_from_bold": attainable and 0.5 + 0.9 * (attainable - 0.5),
        "unit": "person",
        "n_permutations": 999,
        "median_rank": float(np.median(position)),
        "median_rank_chance": (n + 1) / 2,
        "mrr": float((1 / position).mean()),
        "mrr_chance": float((1 / np.arange(1, n + 1)).mean()),
    }
    for k in (1, 5, 10):
        row[f"recall_at_{k}"] = float((position <= k + 1e-9).mean())
        row[f"recall_at_{k}_chance"] = k / n
    return row


def truth(effect: float) -> dict[str, Any]:
    """The oracle line of the simulation."""
    recall = {f"recall_at_{k}": v if effect else k / N_TEST for k, v in ((1, 0.7), (5, 0.9))}
    line = {"n_gallery": N_TEST, **recall}
    from_bold = {key: value - 0.15 for key, value in recall.items()}
    return {
        "preset": "demo",
        "oracle_g_z": {"auc": 0.99, **line},
        "oracle_g_bold": {"auc": 0.94, **line, **from_bold},
    }


def retrieval(ranks: dict[str, np.ndarray], effect: float) -> dict[str, Any]:
    """The whole retrieval part."""
    p_value = 0.001 if effect else 0.31
    rows = {
        name: direction(ranks[name], p_value=p_value, attainable=0.99 if effect else 0.5)
        for name in ("brain_to_dna", "dna_to_brain")
    }
    auc = rows["brain_to_dna"]["auc"]

    def row(name: str, value: float, n: int) -> list[dict[str, Any]]:
        half = 1.96 * 0.25 / np.sqrt(n)
        return [
            {
                "name": name,
                "direction": direction,
                "auc": value + shift,
                "ci_low": value + shift - half,
                "ci_high": value + shift + half,
                "p_value": 0.001 if value - half > 0.5 else 0.31,
                "n_queries": n,
                "n_gallery": n // 2,
            }
            for direction, shift in (("query_to_gallery", 0.0), ("gallery_to_query", 0.004))
        ]

    def one_way(name: str, value: float) -> dict[str, Any]:
        both = row(name, value, N_TEST)
        back = {"auc_dna_to_brain": value, "p_value_dna_to_brain": 0.02}
        return {k: v for k, v in both[0].items() if k != "direction"} | back

    return {
        **rows,
        "shuffled_control": {
            "auc": 0.507,
            "standard_error": 0.0204,
            "p_value": 0.71,
            "n_gallery": N_TEST,
            "brain_to_dna": {"auc": 0.509, "p_value": 0.36, "n_gallery": N_TEST},
            "dna_to_brain": {"auc": 0.505, "p_value": 0.41, "n_gallery": N_TEST},
        },
        "baselines": [
            *row("ridge-CCA on features", 0.5 + 0.8 * (auc - 0.5), N_TEST),
            *row("ridge-CCA on the connectome", 0.5 + 0.7 * (auc - 0.5), N_TEST),
            one_way("ridge-CCA on the connectome, one way", 0.5 + 0.6 * (auc - 0.5)),
            {**one_way("covariates only", 0.5), "ci_low": 0.5, "ci_high": 0.5, "standard_error": 0},
        ],
        "strata": [
            *row("same site", auc - 0.01, 66),
            *row("same sex and age band", auc - 0.02, 41),
            *row("unrelated only", auc, 178),
        ],
    }


def probes(effect: float) -> list[dict[str, Any]]:
    """Probe rows: two continuous targets that the features know, one that confounds know, sex."""
    rows = []
    known = effect > 0
    table = [
        ("cognition", "r2", 0.02, 0.21, 0.17),
        ("trait_1", "r2", 0.01, 0.15, 0.19),
        ("age", "r2", 0.31, 0.30, 0.12),
        ("sex", "auroc", 0.52, 0.74, 0.66),
        ("diagnosis", "auroc", 0.55, 0.61, 0.58),
    ]
    for target, metric, *values in table:
        chance = 0.0 if metric == "r2" else 0.5
        names = (CONFOUNDS, FEATURES, EMBEDDINGS)
        lines = list(zip(names, values, strict=True))
        lines += [(f"{name} | confounds", value - 0.02) for name, value in lines[1:]]
        for name, value in lines:
            if target == "age" and "|" in name:
                continue
            shown = value if known or name == CONFOUNDS else chance - 0.01
            rows.append(
                {
                    "target": target,
                    "kind": "continuous" if metric == "r2" else "binary",
                    "features": name,
                    "metric": metric,
                    "value": shown,
                    "ci_low": shown - 0.06,
                    "ci_high": shown + 0.06,
                    "p_value": 0.001 if shown - 0.06 > chance else 0.4,
                    "chance": chance,
                    "n": 1000,
                }
            )
    return rows


def cca(effect: float) -> dict[str, Any]:
    """Two components, of which the first is there."""
    components = []
    for i, (held, p) in enumerate([(0.62 if effect else 0.01, 0.001 if effect else 0.4), (0, 0.7)]):
        components.append(
            {
                "component": i + 1,
                "n": 994,
                "correlation": 0.8 - 0.1 * i,
                "p_value": p,
                "p_family_wise": p,
                "held_out": held,
                "ci_low": held - 0.05,
                "ci_high": held + 0.05,
                "p_held_out": max(p, 0.005),
                "null_low": -0.07,
                "null_high": 0.08,
            }
        )
    about = {"brain": "brainjepa", "dna": "evo2", "n": 994, "n_people": 1000, "n_pcs": [125, 125]}
    about |= {"held_out_only": False, "n_folds": 5, "n_permutations": 999, "confounds": ["age"]}
    return {**about, "exchanged_within": ["site", "family"], "components": components}


def attribution(effect: float) -> dict[str, Any]:
    """Genes of which two matter, and networks of parcels with places."""

    def rows(names: list[str], drops: list[float]) -> list[dict[str, Any]]:
        return [
            {
                "unit": name,
                "auc": 0.84 - drop,
                "drop": drop,
                "ci_low": drop - 0.01,
                "ci_high": drop + 0.01,
                "p_value": 0.001 if drop > 0.02 else 0.4,
                "q_value": 0.012 if drop > 0.02 else 0.6,
            }
            for name, drop in zip(names, drops, strict=True)
        ]

    rng = np.random.default_rng(5)
    networks = [f"Net{i % 7}" for i in range(60)]
    scale = 1.0 if effect else 0.0
    genes = sorted([0.11 * scale, 0.05 * scale, *(0.002 * rng.normal(size=22))], reverse=True)
    large = sorted([0.06 * scale, *(0.002 * rng.normal(size=6))], reverse=True)
    return {
        "n_people": N_TEST,
        "retrained": False,
        "genes": {"rows": rows([f"GENE{i}" for i in range(24)], genes)},
        "targets": {
            "cognition": {
                "r2": 0.12 * scale,
                "kind": "continuous",
                "n_people": 400,
                "n_missing": 3,
                "n_folds": 5,
                "confounds": ["age", "sex"],
                "penalty": 10.0,
                "rows": [
                    {"r2": 0.1, **{k: v for k, v in row.items() if k != "auc"}}
                    for row in rows([f"GENE{i}" for i in range(24)], genes)
                ],
            }
        },
        "networks": {
            "rows": rows([f"Net{i}" for i in range(7)], large),
            "parcels": [f"p{i}" for i in range(60)],
            "networks": networks,
            "xyz_mm": (rng.uniform(-1, 1, (60, 3)) * [65, 85, 60]).round(1).tolist(),
        },
    }


def _write_arrays(workspace: Path, rng: np.random.Generator, effect: float) -> dict[str, Any]:
    base = rng.normal(size=(N_TEST, 2))
    scores = rng.normal(size=(N_TEST, N_TEST)) * 0.1
    scores[np.diag_indices(N_TEST)] += effect * 0.1
    own = np.diag(scores)
    ranks = {
        "brain_to_dna": (scores < own[:, None]).sum(1) / (N_TEST - 1),
        "dna_to_brain": (scores < own[None, :]).sum(0) / (N_TEST - 1),
    }
    path = workspace / "align" / "brainjepa-evo2" / "similarity.npz"
    path.parent.mkdir(parents=True)
    noise = 0.4 if effect else 1.4
    np.savez(
        path,
        pairs=own,
        non_pairs=scores[~np.eye(N_TEST, dtype=bool)][:5000],
        brain_2d=base,
        dna_2d=base * (effect > 0) + noise * rng.normal(size=(N_TEST, 2)),
        ranks_brain_to_dna=ranks["brain_to_dna"],
        ranks_dna_to_brain=ranks["dna_to_brain"],
    )
    return ranks


def _write_metrics(workspace: Path, rng: np.random.Generator, effect: float) -> None:
    log_n = float(np.log(256))
    pretraining, masked, alignment = [], [], []
    for step in range(0, 401, 5):
        decay = float(np.exp(-step / 90))
        noise = float(rng.normal())
        row = {"step": step, "loss": 0.1 + 0.35 * decay + 0.008 * noise, "lr": 1e-3}
        if step % 50 == 0:
            row["validation_loss"] = 0.11 + 0.34 * decay
        pretraining.append(row)
        row = {"step": step, "loss": 0.6 + (1.1 if step == 0 else 0.4 * decay)}
        masked.append(row)
        gain = effect * (1 - decay)
        row = {"step": step, "loss": log_n - gain + 0.03 * noise}
        row["logit_scale"] = 14.0 + step / 100
        if step % 40 == 0:
            row["validation_loss"] = log_n - 0.5 * gain + max(0, step - 240) * 8e-4
            row["validation_auc"] = 0.5 + 0.22 * gain - max(0, step - 240) * 8e-5
        alignment.append(row)
    for folder, rows in (
        ("pretrain/brainjepa", pretraining),
        ("pretrain/brainlm", masked),
        ("align/brainjepa-evo2", alignment),
    ):
        (workspace / folder).mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (workspace / folder / "metrics.jsonl").write_text(text, encoding="utf-8")
