"""The results of an evaluation on their way to the disk: pictures, curves, statistics, page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vistok.evaluation import codes, protocol
from vistok.evaluation.budgets import panels
from vistok.evaluation.pairs import Pairs, PairSource
from vistok.evaluation.pictures import comparison, grid, save_png, scale_for
from vistok.evaluation.plots import draw
from vistok.evaluation.probe import linear_probe, pooled_latents
from vistok.evaluation.rates import rate_distortion, whole_bytes
from vistok.evaluation.results import Rows, extremes, save_pictures, write_json, write_rows

if TYPE_CHECKING:
    from vistok.evaluation.run import Job


class Findings:
    """What an evaluation found; `write` puts it into its folder.

    Args:
        job: the evaluation.
        config: resolved `configs/eval.yaml`.
        out: folder of the results.
        described: the protocol.
        recorded: what is written next to it.
        results: metrics by number of tokens.
        rows: of all images.
        ids: `(M, N, Q)` of the images whose ids were kept, or None.
        labels: `(M,)` of them.
        codecs: to measure on the same images.
        done: called when everything is written.
    """

    def __init__(
        self,
        job: Job,
        config: Mapping[str, Any],
        out: Path,
        described: dict[str, Any],
        recorded: dict[str, Any],
        results: Mapping[int, dict[str, float]],
        rows: Rows,
        ids: np.ndarray | None,
        labels: np.ndarray,
        codecs: Sequence[str],
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self.done = done
        self.job, self.config, self.out = job, config, out
        self.described, self.recorded, self.results, self.rows = described, recorded, results, rows
        self.ids, self.labels, self.codecs = ids, labels, codecs

    def write(self, page: Path) -> dict[str, Any]:
        """Write everything; return what `metrics.json` holds.

        Args:
            page: the folder for `report.html`.
        """
        from vistok.evaluation.report.page import write_report

        job, settings = self.job, self.config["eval"]
        write_rows(self.out / "per_image.csv", self.rows)
        budgets = self._budget_rows()
        results: dict[str, Any] = {"format": 1, **budgets[-1]}
        results.pop("bytes", None)
        results |= {k: v for k, v in self.recorded.items() if k not in ("model", "machine")}
        results["protocol_hash"] = protocol.protocol_hash(self.described)
        results["protocol"] = self.described
        results["model"], results["machine"] = self.recorded["model"], self.recorded["machine"]
        better = {name: bool(m.higher_is_better) for name, m in job.metrics.items()}
        better |= {f"p{name}": better[name] for name in job.metrics if f"p{name}" in results}
        results["higher_is_better"] = better
        results["budgets"] = [row for row in budgets if row.get("num_tokens") in job.budgets]
        if self.ids is not None and self.ids.size and job.tokenizer is not None:
            sizes = job.tokenizer.quantizer.codebook_sizes
            results["codes"] = codes.statistics(self.ids, sizes)
            self._effects(results["codes"])
            self._probe(results)
        results["extremes"] = extremes(self.rows, better, settings["extremes"])
        self._rates(results, budgets)
        results["pictures"] = self._pictures(results["extremes"])
        write_json(self.out / "metrics.json", results)
        write_report(self.out, page)
        self.done()
        return results

    def _budget_rows(self) -> list[dict[str, Any]]:
        tokenizer, rows = self.job.tokenizer, []
        for budget, found in sorted(self.results.items()):
            row: dict[str, Any] = dict(found)
            if tokenizer is not None:
                height, width = tokenizer.image_size
                bits = budget * tokenizer.quantizer.bits_per_token
                row |= {
                    "bits_per_image": bits,
                    "bits_per_pixel": bits / (height * width),
                    "num_tokens": budget,
                    "bytes": whole_bytes(bits),
                }
            rows.append(row | {"images": len(self.rows)})
        return rows

    # ------------------------------------------------------------------ further looks

    def _spread(self, count: int) -> list[int]:
        """Return the places of some images, evenly spread over those that were measured."""
        numbers = sorted(row["number"] for row in self.rows)
        wanted = min(count, len(numbers))
        return [numbers[int((i + 0.5) * len(numbers) / wanted)] for i in range(wanted)]

    def _pick(self, numbers: Sequence[int]) -> list[Pairs]:
        return picked(self.job.source, numbers)

    def _effects(self, found: dict[str, Any]) -> None:
        count, tokenizer = self.config["eval"]["effect_images"], self.job.tokenizer
        # Where the decoder reads more than tokens, a token's effect depends on that as well.
        if not count or tokenizer is None or tokenizer.decoder.conditions:
            return
        pairs = self._pick(self._spread(count))
        indices = torch.cat([pair.indices for pair in pairs if pair.indices is not None])
        places, maps = codes.effect_maps(tokenizer, indices, self.job.sampling)
        np.savez_compressed(self.out / "effects.npz", places=places, maps=maps)
        found["effects"] = {
            "images": len(indices),
            "places": places,
            "mean": [float(m.mean()) for m in maps],
            # The share of the pixels that take half of the effect: small for local tokens.
            "half_of_effect": [_half(m) for m in maps],
        }

    def _probe(self, results: dict[str, Any]) -> None:
        tokenizer = self.job.tokenizer
        if not self.config["eval"]["probe"] or tokenizer is None or self.ids is None:
            return
        found = linear_probe(pooled_latents(tokenizer, self.ids), self.labels)
        if isinstance(found, str):
            self.job.notes.append(f"linear probe is left out: {found}")
            return
        results["probe"] = found
        results |= {"probe_top1": found["top1"], "probe_chance": found["chance"]}

    def _rates(self, results: dict[str, Any], budgets: Sequence[Mapping[str, Any]]) -> None:
        job, settings = self.job, self.config["eval"]
        results["codecs"] = {}
        if not (self.rows and job.rates(settings, self.codecs)):
            self._curve(results)
            return
        pairs = self._pick(self._spread(settings["codec_images"]))
        bytes_of = {row["num_tokens"]: row["bytes"] for row in budgets}
        results["rates"] = rate_distortion(pairs, job.metrics, bytes_of, self.codecs)
        results["codecs"] = results["rates"]["codecs"]["payload"]
        results["codec_images"] = results["rates"]["images"]
        self._curve(results)

    def _curve(self, results: dict[str, Any]) -> None:
        if results["budgets"]:
            draw(panels(results), self.out / "curve.png")

    def _pictures(self, found: Mapping[str, Any]) -> list[dict[str, Any]]:
        source = self.job.source
        spread = self._spread(self.config["num_pictures"]) if self.config["num_pictures"] else []
        outermost = {e["number"] for m in found.values() for e in (*m["worst"], *m["best"])}
        shown = source.budgets[-1]
        for name in ("reconstructions.png", "budgets.png"):
            (self.out / name).unlink(missing_ok=True)
        if not spread:
            outermost = set()
        pairs = self._pick(spread) + self._pick(sorted(outermost - set(spread)))
        count = 0
        sheet: list[list[torch.Tensor]] = []
        for pair in pairs:
            for i in range(len(pair.numbers)):
                if count < len(spread):
                    rows = [pair.reconstructions[budget][i] for budget in source.budgets]
                    sheet.append([pair.originals[i], *rows])
                count += 1
        if sheet and len({row[0].shape for row in sheet}) == 1:
            first = torch.stack([row[0] for row in sheet]).cpu()
            last = torch.stack([row[-1] for row in sheet]).cpu()
            scale = scale_for((first.shape[-2], first.shape[-1]), self.config["picture_scale"])
            save_png(comparison(first, last), self.out / "reconstructions.png", scale)
            if self.job.budgets:
                asked = [source.budgets.index(b) + 1 for b in self.job.budgets]
                columns = [torch.stack([row[c] for row in sheet]).cpu() for c in (0, *asked)]
                save_png(grid(torch.stack(columns, dim=1)), self.out / "budgets.png", scale)
        return save_pictures(self.out / "pictures", pairs, spread, shown)


def picked(source: PairSource, numbers: Sequence[int]) -> list[Pairs]:
    """Return some images of a source, in their order."""
    step = source.pick_size
    return [source.pick(numbers[i : i + step]) for i in range(0, len(numbers), step)]


def _half(effect: np.ndarray) -> float:
    """Return the share of the pixels that make up half of a map's sum."""
    ordered = np.sort(effect.reshape(-1))[::-1].cumsum()
    if not ordered[-1]:
        return 1.0
    return float((np.searchsorted(ordered, ordered[-1] / 2) + 1) / len(ordered))
