"""What the two papers report, beside the stored results on the letters, as Markdown tables.

Sources: the abstracts of SparseDM (arXiv 2404.10445, v1 to v4) and the log in its repository (wangkafeng/SparseDM, commit
dc72273); the tables in the repository of Diff-Pruning (arXiv 2305.10924); U-ViT's readme. A star marks numbers that others quote.
"""

import json
import statistics

from ..support import markdown
from . import results
from .claims import CLAIMS, verdicts
from .results import Row

UNKNOWN = "no number known"
_STAR = "\\*: as others quote it; the source itself was not at hand."
_COUNTED = "; by our count of its small U-ViT 12.20 G to 6.95 G, attention included"
_OURS = "Here: FD-glyph on 16x16 letters; it is not FID, so compare the ratios within a column only."

# Seconds of SparseDM's log, dense and 2:4, by (MLP ratio, patch size): 50 steps of 256 pictures of 32x32 in float16 on four A40
# GPUs, one run each, of a U-ViT of one block, 8,192 wide, with random weights.
GPU_SECONDS = {
    (1, 1): (32.81, 32.06), (1, 2): (7.66, 7.58), (1, 4): (2.039, 2.010),
    (2, 1): (42.89, 41.24), (2, 2): (9.39, 9.73), (2, 4): (2.549, 2.521),
    (4, 1): (74.89, 60.87), (4, 2): (31.22, 28.29), (4, 4): (3.407, 3.468),
    (8, 1): (130.27, 106.76), (8, 2): (29.05, 24.76), (8, 4): (6.331, 5.864),
}  # fmt: skip
SMALL_UVIT_SECONDS = (7482, 7208)  # of the model whose FID is reported; an earlier sparse run took 15,161 s

# Diff-Pruning's tables: FID, SSIM and steps by data set and method; all but the first row at 56 % of the MACs.
_CIFAR10, _CELEBA = "CIFAR-10", "CelebA-64"
DIFF_PRUNING = {
    ("dense", "teacher"): {_CIFAR10: (4.19, 1.0, "800k"), _CELEBA: (6.48, 1.0, "500k")},
    ("same shape from scratch", "scratch"): {_CIFAR10: (9.88, 0.887, "100k"), _CELEBA: (7.08, 0.833, "100k")},
    ("... trained longer", ""): {_CIFAR10: (5.68, 0.905, "500k"), _CELEBA: (6.73, 0.867, "300k")},
    ("... as long as the dense model", ""): {_CIFAR10: (5.39, 0.905, "800k"), _CELEBA: (6.71, 0.869, "500k")},
    ("random channels", "random"): {_CIFAR10: (5.62, 0.926, "100k"), _CELEBA: (6.70, 0.874, "100k")},
    ("by magnitude", "magnitude"): {_CIFAR10: (5.48, 0.929, "100k"), _CELEBA: (7.08, 0.870, "100k")},
    ("Taylor", "taylor"): {_CIFAR10: (5.56, 0.928, "100k"), _CELEBA: (6.64, 0.880, "100k")},
    ("Diff-Pruning, T = 0", "taylor"): {_CIFAR10: (5.49, 0.932, "100k"), _CELEBA: (6.24, 0.885, "100k")},
    ("Diff-Pruning, T = 0.02", "threshold-0.02"): {_CIFAR10: (5.44, 0.931, "100k"), _CELEBA: (6.45, 0.878, "100k")},
    ("Diff-Pruning, T = 0.05", "diffpruned"): {_CIFAR10: (5.29, 0.932, "100k"), _CELEBA: (6.52, 0.878, "100k")},
}

# Larger pictures: data set, model, M parameters, G MACs, FID, and the recipe that would repeat the row ("": none).
LARGER = (
    ("LSUN church 256", "DDPM, dense", "113.7", "248.7", "10.6", "church256-ddpm"),
    ("", "... pruned shape from scratch, 0.5 M steps", "46.5", "100.7", "40.2", ""),
    ("", "... Diff-Pruning, T = 0.01, 0.5 M steps", "46.5", "100.7", "13.9", "church256-ddpm-diffpruned"),
    ("", "... Diff-Pruning, as later papers quote it", "63.2\\*", "138.8\\*", "13.90\\*", ""),
    ("LSUN bedroom 256", "DDPM, dense", "113.7", "248.7", "6.9", "bedroom256-ddpm"),
    ("", "... pruned shape from scratch, 0.2 M steps", "46.5", "100.7", "50.3", ""),
    ("", "... Diff-Pruning, T = 0.01, 0.2 M steps", "46.5", "100.7", "18.6", "bedroom256-ddpm-diffpruned"),
    ("", "... Diff-Pruning, as later papers quote it", "63.2\\*", "138.8\\*", "17.90\\*", ""),
    ("ImageNet 256", "LDM-4, dense", "400.9\\*", "99.8\\*", "3.60\\*", ""),
    ("", "... Diff-Pruning", "", "", "9.27\\*", ""),
    ("", "U-ViT-L/2, dense", "287", "77", "3.40", "imagenet256-uvit"),
    ("", "... 2:4, SparseDM", "", "", UNKNOWN, "imagenet256-uvit-2x4"),
)

RATIOS = ("31:32", "15:16", "7:8", "3:4", "4:8", "2:4", "1:4", "1:8", "1:16", "1:32")  # the official code's


def sparsedm_table(base: str) -> str:
    """SparseDM at 2:4: the paper's numbers beside those of the letter model `base`."""
    long = {row.recipe.role: row for row in results.load("headline", base)}
    short = {row.recipe.role: row for row in results.load("short", base)}
    uvit = base == "glyphs-uvit"
    found = {claim: verdict.figures for (_, claim, _), verdict in zip(CLAIMS, verdicts(base), strict=True)}
    average = "FID +1.5 (v1), +1.22 (v2), +0.44 (v3), kept (v4), on average over the data sets"
    rows = (
        ("trained 2:4 against dense", average if uvit else "FID +1.22 (v2), on average over U-ViTs and this UNet", (
            f"{_change(long['teacher'], long['2x4'])}; dense with the same extra training {long['more'].fd_text},"
            f" at the lower rate {long['more-gentle'].fd_text}")),
        ("ASP (first masks kept) against dense", "FID 3.97 to 319.87\\* (CIFAR-10)" if uvit else UNKNOWN,
         f"{_change(short['more'], short['2x4-asp'])} (1,000 steps each)"),
        ("masks without training", "FID 3.04 to 380.64 (log; a constant mask)" if uvit else UNKNOWN,
         _change(long["teacher"], long["2x4-oneshot"])),
        ("MACs", f"halved{_COUNTED if uvit else ''}", found["2:4 halves the MACs"]),
        ("time", "about 1.2 times faster, on a GPU", f"{found['it runs faster']}, on a CPU"),
    )  # fmt: skip
    return f"{markdown.table(('', 'the paper says', 'we find'), rows)}\n\n{f'{_STAR} ' if uvit else ''}{_OURS}"


def _change(before: Row, after: Row) -> str:
    return f"{before.fd_text} to {after.fd_text}"


def ratios_table() -> str:
    """The patterns of SparseDM's ratio experiment beside the stored runs, and pruning at about as many MACs."""
    stored = {base: {row.recipe.role: row for row in results.load("short", base)} for base in results.bases()}
    roles = {pattern: pattern.replace(":", "x") for pattern in RATIOS}
    roles |= {f"pruned to {share} of the MACs": f"diffpruned{end}" for share, end in _WIDTHS.items()}
    roles |= {"dense": "more", "2:4, masks only": "2x4-oneshot", "progressive, constant rate": "2x4-progressive-constant"}
    says = dict.fromkeys(RATIOS, UNKNOWN) | {"2:4": "FID +0.44 to +1.5", "progressive, constant rate": "worse than a fixed 2:4"}
    cells = (
        (what, says.get(what, ""), *(rows[role].fd_text if role in rows else "not run" for rows in stored.values()))
        for what, role in roles.items()
    )
    names = [results.load("short", base)[0].recipe.backbone for base in stored]
    table = markdown.table(("", "the paper says", *(f"we find, {name}" for name in names)), cells)
    between = "Between the methods the abstracts say: at other MACs an FID lower by 1 to 137 (v1, v2), by less than 1 (v3, v4)."
    return f"{table}\n\n{between} {_OURS}"


_WIDTHS = {"three quarters": "-most", "half": "", "a quarter": "-quarter"}


def diffpruning_table(base: str) -> str:
    """Diff-Pruning's two tables beside the short runs of the letter model `base`."""
    stored = {row.recipe.role: row for row in results.load("short", base)}
    head = ("method", *(f"{data}: {what}" for data in (_CIFAR10, _CELEBA) for what in ("FID", "SSIM", "steps")))
    rows = []
    for (method, role), published in DIFF_PRUNING.items():
        numbers = [cell for fid, ssim, steps in published.values() for cell in (f"{fid:.2f}", f"{ssim:.3f}", steps)]
        row = stored.get(role)
        ours = (row.fd_text, f"{row.mean('ssim_to_base'):.3f}" if role != "teacher" else "1.000") if row else ("not run", "")
        rows.append((method, *numbers, *ours))
    table = markdown.table((*head, "we find: FD-glyph", "we find: SSIM"), rows)
    share = stored["diffpruned"].macs / stored["teacher"].macs
    notes = f"The paper's pruned models have 56 % of the MACs, ours {share:.0%}. Ours trained for 1,000 steps each."
    return f"{table}\n\n{notes} {_OURS}"


def larger_table() -> str:
    """The papers' numbers for LSUN and ImageNet, and what is stored of the recipes that would repeat them."""
    stored = {row.name: row for row in results.load("paper")}
    rows = []
    for data, model, parameters, gmacs, fid, recipe in LARGER:
        scores = stored[recipe].runs[0]["scores"] if recipe in stored else {}
        ours = f"FID {scores['fid']:.2f}" if "fid" in scores else f"not run: `reproduce {recipe}`" if recipe else ""
        rows.append((data, model, parameters, gmacs, fid, ours))
    return f"{markdown.table(('data', 'model', 'M parameters', 'G MACs', 'FID', 'we find'), rows)}\n\n{_STAR}"


def speed_table() -> str:
    """SparseDM's times on GPUs beside the stored ones on a CPU."""
    cells = [dense / sparse for dense, sparse in GPU_SECONDS.values()]
    dense, sparse = SMALL_UVIT_SECONDS
    rows = [
        ("the abstract", "about 1.2", ""),
        ("one block, 8,192 wide, random weights, 12 shapes (log)",
         f"{min(cells):.2f} to {max(cells):.2f}, mean {statistics.mean(cells):.2f}", ""),
        ("the small U-ViT for CIFAR-10 (log)", f"{dense / sparse:.2f}", _times("uvit-s2-cifar10")),
        ("the UNet for CIFAR-10", UNKNOWN, _times("ddpm-cifar10")),
    ]  # fmt: skip
    rows += [(f"bundled {row.recipe.backbone}", "", f"{row.speedup:.2f}") for row in _bundled()]
    head = ("times faster at 2:4", "the paper says (A40 GPUs)", "we find (CPU, two threads, over the fastest dense)")
    return markdown.table(head, rows)


def _bundled() -> list[Row]:
    return [row for row in results.load("short") if row.recipe.role == "2x4" and row.speedup]


def _times(model: str) -> str:
    """The stored speed-ups of a model of the papers, by data type."""
    rows = json.loads((results.RESULTS / "bench-paper.json").read_text())["rows"]
    best = {row["dtype"]: min(row["speedup"], row["speedup_over_onednn"]) for row in rows if row["what"].startswith(f"{model},")}
    return ", ".join(f"{value:.2f} ({dtype})" for dtype, value in best.items())
