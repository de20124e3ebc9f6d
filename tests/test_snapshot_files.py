"""Files of memories and sessions: of one format that others read, in every dtype and setting; files
of format 1 still load; whatever is damaged or hostile is refused by name."""

import re
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

import ctx
from ctx import _C
from snapshot_files import (
    HOSTILE,
    HOSTILE_ABOUT,
    checksum,
    flipped,
    forged,
    parts,
    sealed,
    state,
)
from strategies import DTYPES, assert_same_bits, cases, memories

#: Files that were written before safetensors, at e6c55c4.
OLD = Path(__file__).parent / "snapshots"


def assert_same(got, want):
    """Two states: names, types and bits."""
    assert got.keys() == want.keys()
    for name, part in want.items():
        assert type(got[name]) is type(part), name
        if isinstance(part, torch.Tensor):
            assert_same_bits(got[name], part)
        else:
            assert got[name] == part, name


# --- every memory ---------------------------------------------------------------------------------


@cases(100)
@given(
    memories(),
    st.sampled_from(DTYPES),
    st.sampled_from([None, torch.int8, torch.bfloat16, torch.float16]),
    st.integers(0, 40),
)
def test_round_trip(tmp_path_factory, setting, dtype, slots, count):
    """A memory of any setting, by its own file, by that of ctx.Memory and by a session's."""
    if dtype == torch.float64 or slots == dtype:
        slots = None
    path = tmp_path_factory.getbasetemp() / "round-trip"
    memory = setting.memory(ctx, dtype, compressed_dtype=slots)
    memory.step(*setting.inputs(count, dtype))
    memory.save(path)
    held = memory.state_dict()
    assert_same(state(path.read_bytes()), held)
    other = setting.memory(ctx, dtype, compressed_dtype=slots)
    other.load(path)
    assert_same(other.state_dict(), held)

    whole = memory.memory
    whole.save(path)
    read = ctx.Memory.load(path)
    assert read.spec == whole.spec
    assert_same(read.state_dict(), whole.state_dict())
    named = state(path.read_bytes())
    assert ctx.Spec.from_dict(named["ctx.Memory"]) == whole.spec
    for name, part in whole.state_dict().items():
        if isinstance(part, torch.Tensor):
            assert_same_bits(named[name], part)

    session = ctx.Session([memory] * 2, rows=2)
    id = session.join()
    for layer in range(2):
        session.step([id], layer, *(x[:1] for x in setting.inputs(count, dtype)))
    data = session.snapshot(id)
    assert session.snapshot(session.restore(data)) == data
    named = state(data)
    assert (named["format"], named["version"], named["layers"]) == ("ctx.Session", 1, 2)
    assert named["layer.1.compressor"] == held["compressor"]


def test_every_type_and_shape():
    """Of tensors in files: views, none, scalars; and names and texts of any letters."""
    types = [*DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    types += [torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {f"{dtype}": torch.arange(6).view(2, 3).to(dtype) for dtype in types}
    tensors |= {"view": torch.arange(24.0).view(4, 6).t()[::2], "none": torch.zeros(3, 0, 2)}
    tensors |= {"scalar": torch.tensor(2.5), 'ü "\\\n\x7f 𝄞': torch.ones(1), "": torch.ones(1)}
    tensors |= {"negative": torch.tensor([1 + 2j]).conj().imag, "grad": torch.ones(2)}
    tensors["grad"].requires_grad_()
    texts = {"a": "", "b": 'ü "\\/\b\f\n\r\t\0 𝄞', "c": "\u2028\ud7ff\ue000"}
    data = _C.tensor_file_bytes(texts, tensors, "where")
    for metadata, read in (_C.tensor_file_of_bytes(data, "where"), parts(data)):
        assert metadata == {**texts, "ctx.crc32": checksum(data)}
        assert read.keys() == tensors.keys()
        for name, x in tensors.items():
            assert read[name].dtype == x.dtype and torch.equal(
                read[name].to(torch.float64), x.detach().to(torch.float64)
            )
    assert tensors["negative"].is_neg()
    plain = {name: x.detach().resolve_neg().contiguous() for name, x in tensors.items()}
    written = save(plain, texts)
    metadata, read = _C.tensor_file_of_bytes(written, "where")
    assert metadata == texts
    for name, x in tensors.items():
        assert torch.equal(read[name].to(torch.float64), x.detach().to(torch.float64))


@pytest.mark.parametrize("number", [1 / 3, 1.0, 1e-300, 1.7976931348623157e308, 5e-324])
def test_numbers_keep_their_bits(number):
    """A double is read as the same one, here and by others."""
    settings = ctx.AttentionSettings(schedule=ctx.Schedule(4, 2, 2), attention_factor=number)
    session = ctx.Session(ctx.KVMemory(settings, 1, 1, 4), rows=1)
    data = session.snapshot(session.join())
    assert state(data)["layer.0.attention_factor"].hex() == number.hex()
    session.leave(0)
    assert session.restore(data) == 1


@pytest.mark.parametrize(
    "metadata, tensors, said",
    [
        ({}, {"a": torch.zeros(2, dtype=torch.complex64)}, "a must be of a type that safetensors"),
        ({}, {"a": torch.zeros(2, device="meta")}, "a must be a dense tensor with values"),
        ({}, {"a": torch.eye(2).to_sparse()}, "a must be a dense tensor with values"),
        ({}, {"__metadata__": torch.zeros(2)}, "names must be others than __metadata__"),
    ],
)
def test_what_cannot_be_written(metadata, tensors, said):
    with pytest.raises(ValueError, match=f"^where: {said}.*, got "):
        _C.tensor_file_bytes(metadata, tensors, "where")


# --- format 1 -------------------------------------------------------------------------------------

B, HKV, H, D = 2, 2, 2, 4


def qkv(first, count, rows=B, dtype=torch.float32):
    """The pairs that the files of format 1 hold: exact in every dtype."""

    def cut(heads, salt):
        number = torch.arange(rows * heads * 40 * D)
        x = ((number * 7919 + salt * 104729) % 61 - 30).double() / 8
        return x.view(rows, heads, 40, D).to(dtype)[:, :, first : first + count]

    return cut(H, 1), cut(HKV, 2), cut(HKV, 3)


def memory(rows=B, seen=0, dtype=torch.float32, **options):
    options = {"max_rewind": 3, "compressor": "max", "position": None, **options}
    made = ctx.KVMemory(ctx.Schedule(4, 3, 2, 2, 1), rows, HKV, D, dtype=dtype, **options)
    if seen:
        made.append(*qkv(0, seen, dtype=dtype)[1:], lengths=torch.tensor([seen, 8]))
    return made


SMALL = {"dtype": torch.bfloat16, "compressed_dtype": torch.int8}


@pytest.mark.parametrize("name", ["kv_memory_1.ctx", "kv_memory_1.pt"])
def test_format_1_of_a_memory(name, tmp_path):
    read, want = memory(**SMALL), memory(seen=21, **SMALL)
    read.load(OLD / name)
    assert_same(read.state_dict(), want.state_dict())
    read.save(tmp_path / "new")
    again = memory(**SMALL)
    again.load(tmp_path / "new")
    assert_same(again.state_dict(), want.state_dict())


def streamed_session():
    session = ctx.Session([memory(1), memory(1)], rows=2)
    id = session.join()
    for layer in range(2):
        session.step([id], layer, *qkv(5 * layer, 13, 1))
    return session, id


@pytest.mark.parametrize("name", ["kv_memory_1.ctx", "kv_memory_1.pt"])
def test_format_1_with_a_tensor_beyond_its_data(name, tmp_path):
    """Its checksums are right, and torch believes the sizes that the pickle says."""
    short = tmp_path / name
    with zipfile.ZipFile(OLD / name) as old, zipfile.ZipFile(short, "w") as new:
        records = {item.filename: old.read(item) for item in old.infolist()}
        longest = max((x for x in records if "/data/" in x), key=lambda x: len(records[x]))
        for record, data in records.items():
            new.writestr(record, data[:-4] if record == longest else data)
    with pytest.raises(ValueError, match=r"path must be a snapshot.*beyond its data"):
        memory(**SMALL).load(short)


def test_format_1_of_a_session():
    session, id = streamed_session()
    want = session.snapshot(id)
    session.leave(id)
    for read in (
        session.load(OLD / "session_1.ctx"),
        session.restore((OLD / "session_1.ctx").read_bytes()),
    ):
        assert session.seen(read) == 13 and session.snapshot(read) == want


def test_format_1_of_ctx_memory():
    read, want = ctx.Memory.load(OLD / "memory_1.ctx"), memory(seen=21, dtype=torch.float16).memory
    assert read.spec == want.spec
    assert_same(read.state_dict(), want.state_dict())


def test_format_1_of_a_cache(tmp_path):
    hf_models = pytest.importorskip("hf_models")
    model = hf_models.model_of("llama")
    sizes = {"window": 4, "compressed": 3, "ratio": 2, "sinks": 1, "max_rewind": 3}
    caches = [ctx.hf.CompressiveCache(model.config, compressor="max", **sizes) for _ in range(3)]
    caches[0].load(OLD / "cache_1.ctx")
    hf_models.logits_of(model, caches[1], hf_models.tokens(1, 21), 5)
    for name, part in caches[1].memory.state_dict().items():
        if isinstance(part, torch.Tensor):
            torch.testing.assert_close(caches[0].memory.state_dict()[name], part)
    caches[0].save(tmp_path / "cache")
    caches[2].load(tmp_path / "cache")
    assert_same(caches[2].state_dict(), caches[0].state_dict())
    assert caches[2].get_seq_length() == 21


def test_format_1_of_compressors():
    """As the package of safetensors wrote it, without a checksum."""
    pytest.importorskip("transformers")
    import ctx.hf

    fitted = ctx.hf.load_compressors(OLD / "compressors_1.safetensors")
    assert [x.name for x in fitted.compressors] == ["gated", "conv"]
    assert fitted.report == {"loss": [0.5, 0.25], "text": "é"}
    for number, x in enumerate(fitted.parameters()):
        assert torch.equal(x, torch.arange(x.numel()).view(x.shape) / 8 + number)


# --- damage ---------------------------------------------------------------------------------------


def into_memory(path):
    other = memory(**SMALL)
    other.load(path)
    return other.state_dict()


def into_session(path):
    session = ctx.Session([memory(1), memory(1)], rows=1)
    return state(session.snapshot(session.load(path)))


def into_ctx_memory(path):
    return ctx.Memory.load(path).state_dict()


def into_compressors(path):
    fitted = ctx.hf.load_compressors(path)
    return {**fitted.state_dict(), "sizes": fitted.schedules, "said": fitted.report}


def whole_files(folder):
    """(how it is read, whether every change is noticed, the bytes) of a file of each kind."""
    session, id = streamed_session()
    memory(seen=21, **SMALL).save(folder / "memory")
    memory(seen=21).memory.save(folder / "ctx.Memory")
    new = {"memory": into_memory, "ctx.Memory": into_ctx_memory}
    for name, into in new.items():
        yield into, True, (folder / name).read_bytes()
    yield into_session, True, session.snapshot(id)
    yield into_memory, False, (OLD / "kv_memory_1.ctx").read_bytes()
    yield into_session, False, (OLD / "session_1.ctx").read_bytes()
    yield into_ctx_memory, False, (OLD / "memory_1.ctx").read_bytes()


def read(into, path, *errors):
    """(what is read, "") or (None, why not)."""
    try:
        return into(path), ""
    except (ValueError, *errors) as error:
        return None, str(error)


def test_flips(tmp_path):
    """A changed byte is noticed; in format 1 it may stand where nothing reads."""
    path, refused = tmp_path / "file", 0
    for seed, (into, always, data) in enumerate(whole_files(tmp_path)):
        path.write_bytes(data)
        want = into(path)
        for damaged in flipped(data, 200, seed):
            path.write_bytes(damaged)
            got, said = read(into, path)
            if got is None:
                assert re.match(r"ctx\.\w+\.load: path must be ", said)
                refused += 1
            else:
                assert not always
                assert_same(got, want)
    assert refused > 900


def test_flips_of_compressors(tmp_path):
    """Those of the checksum's own name are not noticed, as files of before have none."""
    pytest.importorskip("transformers")
    import ctx.hf

    path, unnoticed = tmp_path / "file", 0
    ctx.hf.load_compressors(OLD / "compressors_1.safetensors").save(path)
    data, want = path.read_bytes(), into_compressors(path)
    for damaged in flipped(data, 200, 0):
        path.write_bytes(damaged)
        got, said = read(into_compressors, path)
        if got is None:
            assert "path must be a file of ctx.hf.FittedCompressors.save" in said
        else:
            assert_same(got, want)
            unnoticed += 1
    assert unnoticed < 5


def test_flips_with_the_right_checksum(tmp_path):
    """Somebody else's changes: what is read is what a file says, or an error by name."""
    path, refused = tmp_path / "file", 0
    for seed, (into, fresh, data) in enumerate(whole_files(tmp_path)):
        for damaged in flipped(data, 200, 50 + seed) if fresh else ():
            path.write_bytes(sealed(damaged))
            got, said = read(into, path, TypeError)
            if got is None:
                assert " must " in said
                refused += 1
    assert refused > 50


def test_cut_anywhere(tmp_path):
    """No beginning of a file is one, and nothing may follow."""
    one, session = memory(1), ctx.Session(memory(1), rows=1)
    one.save(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    path = tmp_path / "cut"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"damaged or foreign file.*must"):
            one.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match=r"damaged or foreign file.*data must have"):
        one.load(path)
    data = session.snapshot(session.join())
    session.leave(0)
    for size in range(len(data)):
        with pytest.raises(ValueError, match="that are damaged or of another kind"):
            session.restore(data[:size])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header(name):
    data, said = HOSTILE[name]
    with pytest.raises(ValueError, match=f"^where: .*{re.escape(said)}"):
        _C.tensor_file_of_bytes(data, "where")
    session = ctx.Session(memory(1), rows=1)
    with pytest.raises(ValueError, match=rf"bytes must be a snapshot.*\(.*{re.escape(said)}"):
        session.restore(data)
    assert session.ids == []


@pytest.mark.parametrize("name", HOSTILE_ABOUT)
def test_hostile_description(name, tmp_path):
    data, said = HOSTILE_ABOUT[name]
    with pytest.raises(ValueError, match=f"bytes must be a snapshot.*{said}"):
        ctx.Session(memory(1), rows=1).restore(data)
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=r"ctx\.Memory\.load: "):
        ctx.Memory.load(tmp_path / "file")


def test_files_of_another_kind(tmp_path):
    """A right file of something else says what it is not."""
    path, kept = tmp_path / "file", memory(1)
    kept.memory.save(path)
    with pytest.raises(ValueError, match=r"format must be ctx\.KVMemory, got none"):
        kept.load(path)
    kept.save(path)
    with pytest.raises(ValueError, match="state must be what state_dict returns"):
        ctx.Memory.load(path)
    with pytest.raises(ValueError, match=r"format must be ctx\.Session"):
        ctx.Session(kept, rows=1).load(path)
    metadata, tensors = parts(path.read_bytes())
    path.write_bytes(save(tensors, {"ctx": metadata["ctx"]}))
    with pytest.raises(ValueError, match=r"metadata must have ctx\.crc32, got none"):
        kept.load(path)
    path.write_bytes(forged("{}"))
    with pytest.raises(ValueError, match="metadata must have ctx, got none"):
        kept.load(path)
