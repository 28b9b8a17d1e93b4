"""Read mutated inputs of the data side, each in a separate process: `python tests/data/fuzz.py`.

A case is right if the input is refused in one line, or accepted with what an independent reader
(tarfile, numpy, Pillow) finds in it. Everything else is counted by its kind.
"""

import contextlib
import io
import json
import os
import random
import resource
import select
import signal
import stat
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "tokenizers"), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
from data_helpers import encode, picture  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402

SECONDS, MEMORY = 10, 2 << 30
RIGHT = ("refused", "accepted")
CANARY = "executed"


class Pickled:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


# ---------------------------------------------------------------------- mutations


def mutated(data, rng):
    """Bytes with one to four random changes."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        place = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + rng.choice((1, 4, 8))] = rng.randbytes(rng.choice((1, 4, 8)))
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + rng.randint(1, 600)]
        elif kind == 4:
            data[place:place] = data[place : place + rng.randint(1, 600)]
        else:
            data[place : place + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
    return bytes(data)


def tar_bytes(rng):
    """A tar of one of four layouts."""
    file = io.BytesIO()
    layout = rng.randrange(4)
    names = [
        ["a", "b", "c"],
        ["2021.05.01", "b 2.0", "x"],
        ["d\xe9/a", "b" * 60 + "/" + "b" * 60, "c"],
        ["s.1", "s.2", "t"],
    ]
    with tarfile.open(fileobj=file, mode="w", format=rng.choice((0, 1, 2))) as tar:
        later = []
        for number, name in enumerate(names[layout]):
            image = encode(picture(number, 12, 14), rng.choice(("PNG", "JPEG")))
            add(tar, name + ".jpg", image)
            label = (name + ".cls", b"%d" % number)
            later.append(label) if rng.random() < 0.5 else add(tar, *label)
        for label in later:
            add(tar, *label)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = (
            rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)),
            names[layout][0] + ".jpg",
        )
        tar.addfile(link)
    return file.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    with_mtime = io.BytesIO(data)
    tar.addfile(info, with_mtime)


FIELDS = {
    "name": (0, 100),
    "size": (124, 12),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "prefix": (345, 155),
}


def tar_mutated(rng):
    """A tar with damage, or with headers that say something else and have right checksums."""
    data = bytearray(tar_bytes(rng))
    if rng.random() < 0.4:
        return mutated(bytes(data), rng)
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.randint(1, 2)):
        at = rng.choice(headers)
        start, length = FIELDS[rng.choice(list(FIELDS))]
        value = rng.choice(
            (
                rng.randbytes(length),
                b"\x80" + b"\0" * (length - 5) + b"\x7f\xff\xff\xff",
                b"\xff" * length,
                b"7" * (length - 1) + b"\0",
                b"\0" * length,
                rng.choice((b"x", b"g", b"L", b"K", b"S", b"5", b"1", b"2", b"Z")),
                b"../../" + b"a" * 20 + b".jpg",
            )
        )[:length]
        data[at + start : at + start + len(value)] = value
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


# ---------------------------------------------------------------------- kinds: (prepare, run)


def prepare_tar(folder, rng):
    (folder / "x.tar").write_bytes(tar_mutated(rng))


def run_tar(folder):
    from vistok.data.sources import ShardSource

    source = ShardSource([folder / "x.tar"], others=None)
    ours = [source.read(i)[1] for i in range(len(source))]
    places = len(source.left_out) + sum(source.further_images.values())
    left = " ".join(name for name, _ in source.left_out)
    theirs = defaultdict(list)
    try:
        with tarfile.open(folder / "x.tar", errors="surrogateescape") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    theirs[member.name].append(tar.extractfile(member).read())
    except Exception:
        return "accepted"  # of what tarfile fails to read there is nothing to compare
    images = [
        d for name, all_ in theirs.items() if name.lower().endswith((".jpg", ".png")) for d in all_
    ]
    missing = Counter(images) - Counter(ours)
    if sum(missing.values()) > places:
        return f"wrong: {sum(missing.values())} images are neither used nor named ({left})"
    return "accepted"


def prepare_index(folder, rng):
    from vistok.data.index import sidecar
    from vistok.data.shards import ShardFile

    tar = folder / "x.tar"
    with ShardFile(tar) as shard:
        for number in range(4):
            shard.add(
                f"{number}", encode(picture(number, 9, 9)), "png", number, (9, 9), {"txt": b"hi"}
            )
    path = sidecar(tar)
    kind = rng.randrange(4)
    if kind == 0:
        path.write_bytes(mutated(path.read_bytes(), rng))
        return
    if kind == 1:  # the tar changes, its size stays
        with tarfile.open(tar) as archive:
            members = [(m.name, archive.extractfile(m).read()) for m in archive]
        rng.shuffle(members)
        size = tar.stat().st_size
        with tarfile.open(tar, "w") as archive:
            for name, data in members:
                add(archive, name, data if rng.random() < 0.5 or not name.endswith("cls") else b"7")
        assert tar.stat().st_size == size
        return
    with np.load(path) as arrays:
        found = dict(arrays)
    for name in rng.sample(sorted(found), 2):
        array = found[name]
        change = rng.randrange(6)
        if change == 0 and array.dtype.kind == "i":
            found[name] = array + rng.choice((1, 512, -512, 2**40, -(2**62)))
        elif change == 1:
            found[name] = np.array([Pickled(folder / CANARY)], dtype=object)
        elif change == 2:
            found[name] = array[..., :1] if array.ndim else np.asarray(rng.randrange(9))
        elif change == 3:
            found[name] = array.astype("U20") if array.dtype.kind != "U" else np.zeros(3)
        elif change == 4:
            del found[name]
        else:
            found[name] = huge(rng)
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in found.items():
            archive.writestr(f"{name}.npy", array if isinstance(array, bytes) else npy(array))


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def huge(rng):
    """An array that says it has terabytes."""
    shape = rng.choice(
        ("(1000000000000,)", "(4000000, 4000000)", "(99999999999999999999,)", "(-5, 3)")
    )
    header = f"{{'descr': '{rng.choice(('<f4', '<i8', '|O', '|V9'))}', 'fortran_order': False, 'shape': {shape}, }}"
    header = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 64


def run_index(folder):
    from vistok.data.index import index_of, scan

    found, truth = index_of(folder / "x.tar"), scan(folder / "x.tar")
    for name in ("keys", "offsets", "sizes", "labels", "others", "other_offsets", "other_sizes"):
        if not np.array_equal(getattr(found, name), getattr(truth, name)):
            return f"wrong: {name} of another tar"
    return "accepted"


def prepare_field(folder, rng):
    kind = rng.randrange(5)
    if kind == 0:
        data = huge(rng)
    elif kind == 1:
        data = npy(np.array([Pickled(folder / CANARY)], dtype=object))
    elif kind == 2:
        from safetensors.numpy import save

        data = mutated(save({"a": np.arange(12, dtype=np.float32)}), rng)
        (folder / "x.safetensors").write_bytes(data)
        return
    else:
        kind = rng.choice(("<f4", ">f4", "<i8", "<u2", "<U4", "<c8", "?", "<M8[s]"))
        data = npy(np.arange(24).reshape(4, 6).astype(kind))
        data = mutated(data, rng) if rng.random() < 0.8 else data
    (folder / "x.npy").write_bytes(data)


def run_field(folder):
    from vistok.data.decode import DecodeError
    from vistok.data.fields import _array

    (path,) = folder.glob("x.*")
    try:
        found = _array(path.read_bytes(), path.suffix[1:]).numpy()
    except ValueError as error:
        raise DecodeError(str(error)) from None
    if path.suffix == ".npy":
        expected = np.load(path, allow_pickle=False)
        if (
            found.shape != expected.shape
            or found.tobytes() != expected.astype(found.dtype).tobytes()
        ):
            return "wrong: another array than numpy's"
    return "accepted"


KINDS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "TIFF",
    "BMP",
    "PPM",
    "JPEG2000",
    "TGA",
    "QOI",
    "ICO",
    "AVIF",
)


def prepare_image(folder, rng):
    kind = rng.choice(KINDS)
    modes = {
        "QOI": ("RGB", "RGBA"),
        "PPM": ("RGB", "L"),
        "JPEG": ("RGB", "L", "CMYK"),
        "JPEG2000": ("RGB", "L"),
    }
    mode = rng.choice(modes.get(kind, ("RGB", "L", "P", "1")))
    image = Image.fromarray(picture(rng.randrange(99), 20, 24)).convert(mode)
    if kind in ("TIFF", "PNG") and rng.random() < 0.4:
        image = Image.fromarray(picture(1, 20, 24)[..., 0].astype(np.uint16) * 257)
    if kind == "AVIF":
        image = image.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(10)
    more = {"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    data = encode(image, kind, **more)
    if rng.random() < 0.1:
        data = rng.choice(
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"", b"\xff\xd8\xff")
        )
    elif rng.random() < 0.1 and kind in ("PNG", "BMP"):
        data = data[:16] + b"\0\xff\xff\xff\0\xff\xff\xff" + data[24:]
    else:
        data = mutated(data, rng)
    (folder / "x.img").write_bytes(data)


def run_image(folder):
    from vistok.data.decode import decode

    data = (folder / "x.img").read_bytes()
    found = decode(data)
    warnings.simplefilter("ignore")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            deep = image.mode.startswith("I") or image.mode == "F"
            upright = image if image.format == "TIFF" else ImageOps.exif_transpose(image)
            upright = upright if upright is not None else image
            expected = None
            if not deep and not image.has_transparency_data:
                expected = np.asarray(upright.convert("RGB"))
    except Exception as error:
        # What is wrong with the notes of an image is no reason to refuse its pixels.
        return (
            "accepted"
            if "exif" in str(error).lower() or "orient" in str(error).lower()
            else f"wrong: Pillow says {type(error).__name__} {error}"
        )
    if expected is not None:
        if expected.shape != found.shape:
            return f"wrong: {found.shape} instead of {expected.shape}"
        if np.abs(expected.astype(int) - found).mean() > 3:
            return "wrong: other pixels than Pillow's"
    return "accepted"


def prepare_table(folder, rng):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    images = [encode(picture(n, 9, 9), "PNG") for n in range(6)]
    labels = rng.choice(
        ([0, 1, 2] * 2, ["a", "b", None] * 2, [0.5, 1.0, None] * 2, [[1], [], [2, 3]] * 2)
    )
    parquet.write_table(pa.table({"image": images, "label": labels}), folder / "x.parquet")
    (folder / "x.parquet").write_bytes(mutated((folder / "x.parquet").read_bytes(), rng))


def run_table(folder):
    from vistok.data.decode import DecodeError, decode
    from vistok.data.inputs import open_input

    (folder / "out").mkdir()
    source = open_input(str(folder / "x.parquet")).unpack(folder / "out", 1)
    originals = {encode(picture(n, 9, 9), "PNG") for n in range(6)}
    for number in range(len(source)):
        data = source.read(number)[1]
        if data not in originals:
            try:
                decode(data)
            except DecodeError:
                continue
    return "accepted"


def prepare_folder(folder, rng):
    root = folder / "photos"
    root.mkdir()
    for number in range(rng.randint(1, 6)):
        stem = (
            rng.choice((b"a", b"\xe9", b"b\n", b"c.d", b"e ", b"[f]", b"\xff\xfe")) + b"%d" % number
        )
        suffix = rng.choice((b".jpg", b".PNG", b"", b".jfif", b".heic", b".txt", b".xyz"))
        path = os.path.join(os.fsencode(root), stem + suffix)
        kind = rng.randrange(7)
        if kind <= 2:
            Path(os.fsdecode(path)).write_bytes(
                rng.choice((encode(picture(number, 9, 9)), b"", b"no image"))
            )
        elif kind == 3:
            os.symlink(rng.choice((b"/nowhere", path, b"..", b".")), path)
        elif kind == 4:
            os.mkfifo(path)
        elif kind == 5:
            os.mkdir(path)
        else:
            Path(os.fsdecode(path)).write_bytes(mutated(encode(picture(number, 9, 9)), rng))


def run_folder(folder):
    from vistok.data.decode import DecodeError, decode
    from vistok.data.folders import FolderSource
    from vistok.data.formats import IMAGE_EXTENSIONS

    source = FolderSource(folder / "photos")
    named = len(source.keys) + len(source.left_out)
    for number in range(len(source)):
        try:
            decode(source.read(number)[1])
        except (DecodeError, OSError):
            continue
    print(source.keys.tolist(), source.left_out, file=io.StringIO())
    entries = list(os.scandir(os.fsencode(folder / "photos")))
    wanted = sum(
        e.name.rpartition(b".")[2].lower().decode("ascii", "replace") in IMAGE_EXTENSIONS
        and not stat.S_ISDIR(os.stat(e.path).st_mode if os.path.exists(e.path) else 0)
        for e in entries
    )
    return "accepted" if named >= wanted else f"wrong: {wanted} images, {named} named"


def prepare_text(folder, rng):
    from vistok.data.shards import ShardWriter, write_manifest

    with ShardWriter(folder, "train") as writer:
        writer.write(encode(picture(0, 9, 9)), "png", label=1, size=(9, 9))
    write_manifest(folder, {"train": writer.shards})
    path = folder / "manifest.json"
    kind = rng.randrange(4)
    if kind == 0:
        path.write_bytes(mutated(path.read_bytes(), rng))
    elif kind == 1:
        content = json.loads(path.read_text())
        shard = content["splits"]["train"]["shards"][0]
        shard[rng.choice(list(shard))] = rng.choice(
            (None, -1, 2**70, [], {}, "../../etc/passwd", True)
        )
        path.write_text(json.dumps(content))
    elif kind == 2:
        path.write_text(
            rng.choice(("[" * 100_000, '{"a":' * 50_000, "null", "[]", '{"splits": []}'))
        )
    else:
        path.unlink()
        lines = b"".join(b"%d x\xe9.jpg %d\n%d a b.jpg\t3\n" % (n, n, n) for n in range(3))
        (folder / "list.txt").write_bytes(mutated(lines, rng))


def run_text(folder):
    from vistok.data.inputs import read_list
    from vistok.tools.check_shards import _check, _jobs_of_folder

    if (folder / "list.txt").exists():
        source = read_list(folder / "list.txt")
        for number in range(len(source)):
            try:
                source.read(number)
            except OSError:
                continue
        return "accepted"
    jobs = _jobs_of_folder(folder)
    before = json.loads((folder / "manifest.json").read_bytes())
    if any(job.tar.parent != folder for job in jobs):
        return "wrong: outside of its folder"
    problems = [problem for job in jobs for problem in _check(job, True).problems]
    said = before["splits"]
    shard = next(iter(said.values()))["shards"] if said else []
    from vistok.data.shards import sha256

    true = all(
        (folder / s["name"]).exists() and s["sha256"] == sha256(folder / s["name"]) for s in shard
    )
    return "accepted" if true or problems else "wrong: a manifest that does not fit"


CASES = {
    "tars": (200, prepare_tar, run_tar),
    "indexes": (120, prepare_index, run_index),
    "fields": (120, prepare_field, run_field),
    "images": (240, prepare_image, run_image),
    "tables": (60, prepare_table, run_table),
    "folders": (80, prepare_folder, run_folder),
    "manifests and lists": (80, prepare_text, run_text),
}


# ---------------------------------------------------------------------- one case


def outcome(kind, number, root):
    """Return what becomes of a case: (outcome, seconds)."""
    _, prepare, run = CASES[kind]
    folder = Path(tempfile.mkdtemp(dir=root))
    prepare(folder, random.Random(f"{kind} {number}"))
    reader, writer = os.pipe()
    begun = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reader)
        os.setsid()
        said = _run(run, folder)
        os.write(writer, said.encode("utf-8", "backslashreplace")[:4000])
        os._exit(0)
    os.close(writer)
    there, _, _ = select.select([reader], [], [], SECONDS)
    said = os.read(reader, 4096).decode() if there else "hang"
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not said:
        said = f"crash: signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "crash"
    if any(folder.rglob(CANARY)):
        said = "executed"
    return said, time.monotonic() - begun


def _run(run, folder):
    from vistok.core.errors import VistokError
    from vistok.data.decode import DecodeError

    os.environ["VISTOK_CACHE"] = str(folder / "cache")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    pages = (
        int(Path("/proc/self/statm").read_text().split()[0])
        if os.path.exists("/proc/self/statm")
        else 0
    )
    if pages:
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        return run(folder)
    except (VistokError, DecodeError) as error:
        text = str(error)
        if not text or "\n" in text or "Traceback" in text or not text.isprintable():
            return f"poor message: {text!r}"
        return "refused"
    except MemoryError:
        return "memory"
    except BaseException as error:
        import traceback

        return "raw: " + "".join(traceback.format_exception(error))[-1500:]


def fuzz(share=1.0, root=None):
    """Counts of outcomes by kind, and the cases that are not right."""
    import pyarrow.parquet  # noqa: F401 (once, not by each process)

    import vistok.data.fields
    import vistok.data.inputs
    import vistok.tools.check_shards  # noqa: F401

    Image.init()
    counts, wrong = {}, []
    with tempfile.TemporaryDirectory(dir=root) as folder:
        for kind, (total, _, _) in CASES.items():
            counts[kind] = Counter()
            for number in range(max(1, int(total * share))):
                said, seconds = outcome(kind, number, folder)
                counts[kind][said.partition(":")[0]] += 1
                if said not in RIGHT:
                    wrong.append(f"{kind} {number} ({seconds:.1f} s): {said}")
    return counts, wrong


def table(counts):
    """The outcomes as a table in Markdown."""
    columns = (
        "refused",
        "accepted",
        "raw",
        "poor message",
        "wrong",
        "hang",
        "memory",
        "crash",
        "executed",
    )
    lines = [f"| input | cases | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    total = sum(counts.values(), Counter())
    for kind, found in [*counts.items(), ("all", total)]:
        numbers = " | ".join(str(found[column]) for column in columns)
        lines.append(f"| {kind} | {sum(found.values())} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    found, failures = fuzz(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
    print(table(found), *failures, sep="\n")
