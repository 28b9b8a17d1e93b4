# ruff: noqa: E402
"""Run commands on mutated runs, each in a separate process: `fuzz_runs.py SEED N`.

Importing takes longer than a case; it is done once, and every case is a fork. The table says how
the commands answered: one line with the file or the key, or something worse.
"""

import copy
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tokenizers"), str(Path(__file__).parent)]

import torch

import vistok.cli
import vistok.evaluation.run
import vistok.export.exporter
import vistok.export.importer
import vistok.tasks.reconstruction
import vistok.training.run
from helpers import TINY, make_photos
from vistok.checkpoints.write import write_sealed
from vistok.core.yaml_file import read_yaml

LIMIT = 10  # seconds of a case
MEMORY = 2 << 30  # bytes that a case may take on top
ANSWERS = (
    "one line",
    "accepted",
    "traceback",
    "raw exception",
    "silent",
    "hang",
    "memory",
    "crash",
)
ANSWERS += ("executed", "not named", "stopped by a side file")


#: Keys whose text may be anything, or that a resume takes from elsewhere.
FREE = {"name", "task", "project", "cache_dir", "resume", "init_from", "proxy", "autoencoder"}
FREE |= {"format", "weights", "plugins", "debug", "overwrite", "_target_"}


class Evil:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


class Case:
    """A command, and what it must answer.

    Attributes:
        words: of the command; the first is its name.
        named: one of these must be in the line.
        refused: whether it must be: True, False (it must succeed) or None (either).
    """

    def __init__(self, kind, words, named=(), refused=True):
        self.kind, self.words, self.named, self.refused = kind, words, named, refused


class Fuzz:
    def __init__(self, folder, seed):
        self.folder = folder
        self.random = random.Random(seed)
        self.photos = make_photos(folder / "photos", 12)
        os.chdir(folder)
        self.words = [*TINY, "data=folder", f"data.train={self.photos}", "data.image_size=16"]
        self.words += ["data.val_fraction=0.2", "trainer.max_steps=2"]
        self.words += ["trainer.val_check_interval=2", "callbacks.checkpoint_every=2"]
        code, said = self.fork(["train", *self.words, "hydra.run.dir=base"], 120)
        assert code == 0, said
        code, said = self.fork(["export", "run=base", "out=exported"], 120)
        assert code == 0, said
        self.config = read_yaml(folder / "base" / "config.yaml")
        last = folder / "base" / "checkpoints" / "last.ckpt"
        self.content = torch.load(last, weights_only=True)
        self.mark = folder / "executed"

    # ------------------------------------------------------------------ a case

    def fork(self, words, limit):
        """Run a command in a fork; its exit code and all it said."""
        said = self.folder / "said.txt"
        process = os.fork()
        if not process:
            os.setsid()
            descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            signal.setitimer(
                signal.ITIMER_PROF, limit
            )  # processor time, so a slow machine does not count
            torch.set_num_threads(1)
            code = 70
            try:
                code = vistok.cli.main([str(word) for word in words])
            except SystemExit as error:
                code = error.code
            except BaseException as error:
                print("Traceback", type(error).__name__, error)
            sys.stdout.flush()
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            os._exit(code if used < self.base() + MEMORY else 71)
        status = os.waitpid(process, 0)[1]
        return os.waitstatus_to_exitcode(status), said.read_text(errors="replace")

    def base(self):
        return 1 << 30

    def judge(self, case):
        """How a command answered."""
        code, said = self.fork(case.words, LIMIT)
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        if self.mark.exists():
            return "executed", said
        if code == -signal.SIGPROF:
            return "hang", said
        if code < 0:
            return "crash", said
        if code == 71:
            return "memory", said
        if "Traceback" in said:
            return "traceback", said
        if "debug=true shows where" in said:
            return "raw exception", said
        if code == 0:
            return ("silent" if case.refused else "accepted"), said
        if case.refused is False:
            return "stopped by a side file", said
        if len(lines) != 1 or len(lines[0]) > 700:
            return "raw exception", said
        if case.named and not any(str(name) in lines[0] for name in case.named):
            return "not named", said
        return "one line", said

    # ------------------------------------------------------------------ kinds of cases

    def cases(self):
        kinds = [
            self.override,
            self.stored_value,
            self.stored_text,
            self.checkpoint_value,
            self.checkpoint_bytes,
            self.side_file,
            self.export_file,
            self.released,
        ]
        while True:
            for kind in kinds:
                yield kind()

    def run_copy(self):
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        return Path(shutil.copytree(self.folder / "base", run)).relative_to(self.folder)

    def leaves(self, value, path=()):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from self.leaves(inner, (*path, key))
        else:
            yield path, value

    def bad_value(self):
        """A key of the run's config, and a value that it cannot take."""
        while True:
            path, value = self.random.choice(list(self.leaves(self.config)))
            if path[-1] in FREE or (path[0] == "loss" and path[-1] == "weight"):
                continue
            pool = ["nonsense-word", [[1], [2]], {"a": 1}, 10**30, math.nan, -(10**9)]
            if isinstance(value, str):
                pool = [3.5, [[1]], {"a": 1}, True]
            if isinstance(value, bool):
                pool = ["nonsense-word", 3, [1], {"a": 1}]
            return path, self.random.choice(pool)

    def override(self):
        path, value = self.bad_value()
        text = json.dumps(value).replace('"', "").replace(" ", "").replace("NaN", "nan")
        key = ".".join(path)
        words = ["train", *self.words, f"{key}={text}", "hydra.run.dir=fresh"]
        shutil.rmtree(self.folder / "fresh", ignore_errors=True)
        return Case("override", words, (path[-1], path[0]))

    def store(self, config):
        import yaml

        run = self.run_copy()
        (self.folder / run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        return ["train", f"resume={run}", "trainer.max_steps=3"]

    def stored_value(self):
        config = copy.deepcopy(self.config)
        path, value = self.bad_value()
        while path == ("trainer", "max_steps"):
            path, value = self.bad_value()
        holder = config
        for part in path[:-1]:
            holder = holder[part]
        holder[path[-1]] = value
        return Case("run config: value", self.store(config), (path[-1], path[0], "config.yaml"))

    def stored_text(self):
        run = self.run_copy()
        path = self.folder / run / "config.yaml"
        data = bytearray(path.read_bytes())
        how = self.random.randrange(6)
        refused = None
        if how == 0:
            data = data[: self.random.randrange(len(data))]
        elif how == 1:
            for _ in range(8):
                data[self.random.randrange(len(data))] = self.random.randrange(256)
        elif how == 2:
            bomb = "a0: &a0 [x, x]\n" + "".join(
                f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
            )
            data, refused = data + bomb.encode(), True
        elif how == 3:
            data, refused = b"[" * self.random.randrange(1, 100_000), True
        elif how == 4:
            line = self.random.choice(["x: &x [*x]\n", "x: !!python/object/apply:os.mkdir [e]\n"])
            data, refused = data + line.encode(), True
        else:
            data, refused = data + b"\nleak: ${oc.env:HOME}\n", True
        path.write_bytes(data)
        words = ["train", f"resume={run}", "trainer.max_steps=3"]
        return Case("run config: text", words, ("config.yaml", "run"), refused)

    def checkpoint_value(self):
        run = self.run_copy()
        content = copy.deepcopy(self.content)
        target = self.random.choice(
            [
                "global_step",
                "state_dict",
                "ema",
                "optimizer",
                "position",
                "schedule",
                "config",
                "random_state",
                "top",
                "missing",
            ]
        )
        bad = self.random.choice(["word", None, -1, [1], {"a": 1}, 2.5])
        state = content["state_dict"]
        name = self.random.choice([n for n, v in state.items() if v.is_floating_point()])
        mangled = self.random.choice(
            [bad, torch.full_like(state[name], math.nan), torch.zeros(3, 1, 2), state[name].long()]
        )
        if target == "global_step":
            content["global_step"] = bad
        elif target == "state_dict":
            state[self.random.choice([name, name, name + "x"])] = mangled
        elif target == "ema":
            place = self.random.choice(
                [n for n in content["ema"]["weights"] if n in self.trained()]
            )
            if self.random.random() < 0.3:
                content["ema"]["num_updates"] = "word"
            else:
                content["ema"]["weights"][place] = self.random.choice(
                    [
                        "x",
                        torch.zeros(2, 9),
                        torch.full_like(content["ema"]["weights"][place], math.inf),
                    ]
                )
        elif target == "optimizer":
            optimizer = content["optimizer_states"][0]
            number = self.random.choice(list(optimizer["state"]))
            if self.random.random() < 0.5:
                optimizer["state"][number]["exp_avg"] = torch.zeros(2, 9)
            else:
                optimizer["param_groups"][0][self.random.choice(["lr", "eps"])] = "word"
        elif target == "position":
            key = self.random.choice(["samples_seen", "fingerprint", "seed"])
            content["VistokDataModule"][key] = bad
        elif target == "schedule":
            content["schedule"][self.random.choice(list(content["schedule"]))] = "word"
        elif target == "config":
            path, value = self.bad_value()
            holder = content["hyper_parameters"]["config"]
            for part in path[:-1]:
                holder = holder[part]
            holder[path[-1]] = value
            self.seal(content, run)
            return Case(
                "checkpoint: config",
                ["eval", f"run={run}", "device=cpu"],
                ("ckpt", path[-1], path[0]),
            )
        elif target == "random_state":
            content["random_state"][0][self.random.choice(["python", "numpy", "torch"])] = bad
        elif target == "top":
            key = self.random.choice(["optimizer_states", "callbacks", "loops", "ema"])
            content[key] = "word"
        else:
            del content[
                self.random.choice(
                    [
                        "state_dict",
                        "hyper_parameters",
                        "optimizer_states",
                        "loops",
                        "VistokDataModule",
                    ]
                )
            ]
        self.seal(content, run)
        words = ["train", f"resume={run}", "trainer.max_steps=3"]
        return Case("checkpoint: value", words, ("ckpt",))

    def trained(self):
        return {n.removeprefix("tokenizer.") for n in self.content["state_dict"]} - {
            n for n in self.content["ema"]["weights"] if "quantizer" in n
        }

    def seal(self, content, run):
        for path in (self.folder / run / "checkpoints").iterdir():
            path.unlink()
        step = content.get("global_step")
        kept = dict(content)
        if not isinstance(step, int) or step < 0:
            from vistok.checkpoints import write as module

            before, module.step_of = module.step_of, lambda content: 2
            try:
                write_sealed(kept, self.folder / run / "checkpoints" / "last.ckpt")
            finally:
                module.step_of = before
        else:
            write_sealed(kept, self.folder / run / "checkpoints" / "last.ckpt")

    def checkpoint_bytes(self):
        run = self.run_copy()
        folder = self.folder / run / "checkpoints"
        (folder / "best.ckpt").unlink(missing_ok=True)
        path = folder / "last.ckpt"
        data = bytearray(path.read_bytes())
        how = self.random.randrange(5)
        if how == 0:
            data = data[: self.random.randrange(len(data))]
        elif how == 1:
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        elif how == 2:
            data = data[:-96]  # without its seal
        elif how == 3:
            data[-self.random.randrange(2, 90)] ^= 4
        else:
            buffer = io.BytesIO()
            torch.save({**self.content, "callbacks": Evil(self.mark)}, buffer)
            data = buffer.getvalue()
        path.write_bytes(data)
        command = self.random.choice(
            [
                ["train", f"resume={run}", "trainer.max_steps=3"],
                ["eval", f"run={run}", "device=cpu"],
            ]
        )
        return Case("checkpoint: bytes", command, ("last.ckpt",))

    def side_file(self):
        run = self.run_copy()
        junk = self.random.choice(
            [
                b"",
                b"[",
                b"[" * 200_000,
                b"null",
                b'{"steps": "x"}',
                b'{"steps": 1e999}',
                bytes(range(256)),
            ]
        )
        name = self.random.choice(["summary.json", "eval/metrics.json", "metrics.jsonl"])
        (self.folder / run / "eval").mkdir(exist_ok=True)
        (self.folder / run / name).write_bytes(junk)
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        commands = [
            ["train", f"resume={run}", "trainer.max_steps=3"],
            ["export", f"run={run}", "out=out"],
        ]
        return Case("side file", self.random.choice(commands), (), False)

    def export_file(self):
        out = self.folder / "changed"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.folder / "exported", out)
        how = self.random.randrange(4)
        if how == 0:
            path = out / "model.safetensors"
            data = path.read_bytes()
            path.write_bytes(data[: self.random.randrange(len(data))])
        elif how == 1:
            path = out / "model.safetensors"
            data = bytearray(path.read_bytes())
            data[:8] = self.random.randbytes(8)
            path.write_bytes(data)
        elif how == 2:
            (out / "config.json").write_bytes(
                self.random.choice([b"", b"[]", b"{}", b"[" * 99999, b"\xff\xfe"])
            )
        else:
            path = out / "config.json"
            config = json.loads(path.read_text())
            part = self.random.choice(["tokenizer", "quantizer"])
            config[part] = self.random.choice([None, "x", [], {}, {"_target_": "os.system"}, 3])
            path.write_text(json.dumps(config))
        words = ["eval", "run=changed", "device=cpu", "data=folder", f"data.val={self.photos}"]
        return Case("export", [*words, "data.image_size=16"], ("changed", "tokenizer", "quantizer"))

    def released(self):
        path = self.folder / self.random.choice(["w.bin", "w.pth", "w.safetensors"])
        how = self.random.randrange(5)
        if how == 0:
            path.write_bytes(self.random.randbytes(self.random.randrange(5000)))
        elif how == 1:
            torch.save({"model": Evil(self.mark)}, path)
        elif how == 2:
            torch.save(
                self.random.choice([[1], "word", {"a": 3}, {3: torch.zeros(2)}, {}, None]), path
            )
        elif how == 3:
            torch.save({f"encoder.{i}.weight": torch.zeros(2, 2) for i in range(9)}, path)
        else:
            size = self.random.choice([10**15, 2**63, 100])
            header = json.dumps(
                {"a": {"dtype": "F32", "shape": [size], "data_offsets": [0, size * 4]}}
            )
            path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 64)
        from vistok.core.registry import registered

        source = self.random.choice(list(registered("importer")))
        shutil.rmtree(self.folder / "imported", ignore_errors=True)
        words = ["import_weights", f"source={source}", f"weights={path.name}", "out=imported"]
        return Case("released weights", ["import-weights", *words[1:]], (path.name, "weights"))


def main(seed, count, folder=None):
    """Try so many cases; print the table, and each that was not answered well."""
    with tempfile.TemporaryDirectory(prefix="vistok-fuzz-") as made:
        fuzz = Fuzz(Path(folder or made).resolve(), seed)
        table = {}
        bad = 0
        for _, case in zip(range(count), fuzz.cases(), strict=False):
            answer, said = fuzz.judge(case)
            table.setdefault(case.kind, Counter())[answer] += 1
            if answer not in ("one line", "accepted"):
                bad += 1
                words = [word for word in case.words if word not in fuzz.words]
                last = " | ".join(said.strip().splitlines()[-2:])[-400:]
                print(f"{answer}: {case.kind}: {' '.join(map(str, words))}\n    {last}")
                if (fuzz.mark).exists():
                    fuzz.mark.rmdir()
        names = [name for name in ANSWERS if any(row[name] for row in table.values())]
        print("".join(f"{name:>24}" for name in ("", *names)))
        for kind, row in table.items():
            print(f"{kind:>24}" + "".join(f"{row[name]:>24}" for name in names))
        print(json.dumps({"cases": count, "bad": bad}))
        os.chdir("/")
        return bad


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])) > 0)
