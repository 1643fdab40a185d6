"""Perplexity, bits per byte and loss by position of the run's text, or accuracy of the task that it was trained on."""

import copy

from zoo import data
from zoo.config import places
from zoo.data.synthetic import ValidationRows
from zoo.errors import UsageError
from zoo.evaluate import documents
from zoo.evaluate.perplexity import perplexity
from zoo.evaluate.task import Request, Task
from zoo.figures import Chart, Line, Table, interval, line_names, of_runs, shown


class Perplexity(Task):
    name = "perplexity"
    about = "loss, perplexity and bits per byte of the text, by context length and by position"
    of_text = both_ways = True

    def check(self, request):
        model = request.run.model
        if model.learned_positions and (length := max(request.context_lengths)) > model.max_positions:
            raise UsageError(f"--context_length: {length} exceeds the model's {model.max_positions} learned positions")
        for place in places(request.config.model):
            if place.longest is not None and (length := max(request.context_lengths)) > place.longest:
                raise UsageError(f"--context_length: {length} exceeds {place.family}'s table of {place.longest} tokens")
        for length in request.context_lengths:
            self._batches(request, length)

    def measure(self, request):
        results, kept = [], {}
        for length in request.context_lengths:
            batches = self._batches(request, length)
            is_text = not isinstance(batches, ValidationRows)
            found = documents.Documents.none(batches.num_documents)

            def add(i, batch, losses, batches=batches, found=found):
                found.add(batches.documents(i), losses, batch["weights"], batch["bytes"])

            tracked = request.track(batches, f"context {length}")
            result = perplexity(request.run.model, tracked, batches.labels, on_scores=add)
            read_in = documents.Read(length, 0 if is_text else batches.batch_size)
            kept |= documents.to_arrays(read_in, found)
            low, high = documents.interval(found) or (None, None)
            result |= {"documents": int((found.tokens > 0).sum()), "low": low, "high": high}
            result["unit"] = "bits per byte" if is_text and result["bytes"] else "nats per token"
            results.append({"context_length": length} | result)
        return {"by_context_length": results}, kept

    def figures(self, result):
        of_unit = {"bits per byte": "bits_per_byte", "nats per token": "loss"}
        return {
            f"{r['unit']}, context {r['context_length']}": r[of_unit[r["unit"]]] for r in result["by_context_length"]
        }

    @staticmethod
    def _batches(request: Request, length: int) -> data.ValidationBatches | ValidationRows:
        """Rows of other lengths than the run's keep the number of tokens in a batch."""
        config = copy.deepcopy(request.config)
        rows = config.eval.batch_size or config.train.batch_size
        config.eval.batch_size = max(1, rows * config.train.context_length // length)
        return data.validation_batches(config, length, max_batches=request.batches)

    def tables(self, results):
        asks = any(r["accuracy"] is not None for result in results.values() for r in result["by_context_length"])
        headings = ["context length", "loss (nats per token)", "perplexity", "bits per byte", "95 % interval"]
        rows = {
            run: [
                [
                    f"{r['context_length']}",
                    shown(r["loss"], ".4f"),
                    shown(r["perplexity"], ".3f"),
                    shown(r["bits_per_byte"], ".4f"),
                    interval(r.get("low"), r.get("high"), ".4f"),
                    *([shown(r["accuracy"], ".2%")] if asks else []),
                    f"{r['tokens']:,}",
                ]
                for r in result["by_context_length"]
            ]
            for run, result in results.items()
        }
        headings += ["accuracy", "answers"] if asks else ["tokens"]
        return [of_runs("perplexity", headings, rows), *self._by_position(results)]

    @staticmethod
    def _by_position(results) -> list[Table]:
        """Of a single run: of several a chart says it better."""
        if len(results) > 1:
            return []
        by_length = next(iter(results.values()))["by_context_length"]
        columns = [{(b["first"], b["last"]): b["loss"] for b in r["loss_by_position"]} for r in by_length]
        rows = [
            [f"{first}" if first == last else f"{first} to {last}"]
            + [shown(column[first, last], ".4f") if (first, last) in column else "" for column in columns]
            for first, last in sorted(set().union(*columns))
        ]
        return [Table("loss by position", ["position", *(f"context {r['context_length']}" for r in by_length)], rows)]

    def charts(self, results):
        """Of several runs each one's longest context: a line a run."""
        chosen = {
            run: result["by_context_length"][-1:] if len(results) > 1 else result["by_context_length"]
            for run, result in results.items()
        }
        names = line_names({run: [f"context {r['context_length']}" for r in of_run] for run, of_run in chosen.items()})
        lines = [
            Line(name, [(b["last"], b["loss"]) for b in r["loss_by_position"]], run)
            for run, of_run in chosen.items()
            for name, r in zip(names[run], of_run, strict=True)
        ]
        return [Chart("Loss by position", "position in the context, up to (tokens)", "loss (nats per token)", lines)]
