"""Files of snapshots as others have them: read by the package of safetensors; forged, damaged."""

import json
import random
import struct
import zlib

from safetensors.torch import load

MARK = b'"ctx.crc32":"'
ZEROS = b"0" * 8


def parts(data):
    """(metadata, tensors by name) of a file, by the package of safetensors."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])["__metadata__"], load(data)


def state(data):
    """Every part of a snapshot by name, without this library."""
    metadata, tensors = parts(data)
    assert metadata.keys() == {"ctx", "ctx.crc32"} and metadata["ctx.crc32"] == checksum(data)
    return {**json.loads(metadata["ctx"]), **tensors}


def place(data):
    """Where the digits of the checksum are."""
    return data.index(MARK) + len(MARK)


def checksum(data):
    """What a file's checksum must be."""
    at = place(data)
    return f"{zlib.crc32(data[:at] + ZEROS + data[at + 8 :]):08x}"


def sealed(data):
    """The same with the right checksum, if there is one."""
    if MARK not in data[:-8]:
        return data
    at = place(data)
    return data[:at] + checksum(data).encode() + data[at + 8 :]


def flipped(data, count, seed):
    """The same with a changed byte, `count` times."""
    chance = random.Random(seed)
    for _ in range(count):
        at = chance.randrange(len(data))
        yield data[:at] + bytes([data[at] ^ chance.randint(1, 255)]) + data[at + 1 :]


def forged(header, data=b"", length=None):
    """A file with any header."""
    header = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def about(said, metadata=None, more=""):
    """A file without tensors and with the right checksum: `said` is the text of its "ctx"."""
    metadata = {"ctx": said} if metadata is None else metadata
    rest = "".join(f",{json.dumps(key)}:{json.dumps(x)}" for key, x in metadata.items())
    return sealed(forged('{"__metadata__":{' + f'"ctx.crc32":"00000000"{rest}}}{more}}}'))


def entry(dtype='"U8"', shape="[4]", offsets="[0,4]", more=""):
    """A tensor in a header."""
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def one(data=bytes(4), **changed):
    """A file of one tensor."""
    return forged(f'{{"a":{entry(**changed)}}}', data)


def two(first, second, data=bytes(8)):
    return forged(f'{{"a":{entry(offsets=first)},"b":{entry(offsets=second)}}}', data)


_DEEP = 100_000
_PLACE, _ASCEND = "must begin at byte", "two data_offsets that ascend"
_SIGN, _WHOLE, _BITS = "a number", "JSON must have a", "63 bits"

#: {what is wrong: (a file, what the error says)}
HOSTILE = {
    "nothing": (b"", "at least 8 bytes, got 0"),
    "seven bytes": (bytes(7), "at least 8 bytes, got 7"),
    "no header": (forged(b""), "begin with {"),
    "a length beyond the file": (forged("{}", length=3), "at most 2 bytes, got 3"),
    "a length of 2**63": (forged("{}", length=2**63), "at most 2 bytes, got 9223372036854775808"),
    "the largest length": (forged("{}", length=2**64 - 1), "at most 2 bytes, got 1844674407370955"),
    "a header of another kind": (forged("[]"), "begin with {"),
    "white space before the header": (forged(" {}"), "begin with {"),
    "text behind the header": (forged("{} x"), "an end"),
    "no end of the header": (forged('{"a":'), _WHOLE),
    "no end of a string": (forged('{"a'), "an end of every string"),
    "a comma at the end": (forged('{"__metadata__":{},}'), _WHOLE),
    "no comma": (forged('{"__metadata__":{} "a":{}}'), _WHOLE),
    "single quotes": (forged("{'a':{}}"), _WHOLE),
    "a tensor that is a number": (forged('{"a":1}'), _WHOLE),
    "data without a tensor": (forged("{}", b"x"), "must have 0 bytes as the header says, got 1"),
    "data behind the tensors": (one(bytes(5)), "must have 4 bytes as the header says, got 5"),
    "a tensor beyond the data": (one(bytes(3)), "must have 4 bytes as the header says, got 3"),
    "a negative offset": (one(offsets="[-4,0]"), _SIGN),
    "offsets that descend": (one(offsets="[4,0]"), _ASCEND),
    "three offsets": (one(offsets="[0,4,4]"), _ASCEND),
    "no offsets": (one(offsets="[]"), _ASCEND),
    "an offset of 2**63": (one(offsets=f"[0,{2**63}]"), _BITS),
    "an offset of many digits": (one(offsets="[0," + "9" * 1000 + "]"), _BITS),
    "an offset with a point": (one(offsets="[0,4.0]"), _WHOLE),
    "an offset with an exponent": (one(offsets="[0,4e0]"), _WHOLE),
    "an offset with a zero before it": (one(offsets="[00,4]"), _SIGN),
    "an offset that is a text": (one(offsets='["0","4"]'), _SIGN),
    "an offset that is NaN": (one(offsets="[0,NaN]"), _SIGN),
    "an offset that is true": (one(offsets="[false,true]"), _SIGN),
    "tensors that overlap": (two("[0,4]", "[2,6]"), _PLACE),
    "tensors of one place": (two("[0,4]", "[0,4]"), _PLACE),
    "a gap between tensors": (two("[0,4]", "[5,9]", bytes(9)), _PLACE),
    "a gap before a tensor": (one(bytes(8), offsets="[4,8]"), _PLACE),
    "a name twice": (forged(f'{{"a":{entry()},"a":{entry()}}}', bytes(4)), "a name once"),
    "a name twice, escaped": (forged(f'{{"a":{entry()},"\\u0061":{entry()}}}'), "a name once"),
    "a key twice": (one(more=',"dtype":"U8"'), "a name once"),
    "metadata twice": (forged('{"__metadata__":{},"__metadata__":{}}'), "a name once"),
    "a key of metadata twice": (forged('{"__metadata__":{"a":"","a":""}}'), "a name once"),
    "metadata that is a number": (forged('{"__metadata__":{"a":1}}'), 'a "'),
    "metadata that is a list": (forged('{"__metadata__":[]}'), "a {"),
    "another key": (one(more=',"strides":[1]'), "got strides"),
    "no dtype": (forged('{"a":{"shape":[4],"data_offsets":[0,4]}}', bytes(4)), "a dtype, a shape"),
    "an unknown dtype": (one(dtype='"F33"'), "known dtype, got F33"),
    "a dtype in small letters": (one(dtype='"u8"'), "known dtype, got u8"),
    "a dtype that is a number": (one(dtype="1"), 'a "'),
    "a dtype of another width": (one(dtype='"F64"'), "32 bytes as its sizes say, got 4"),
    "flags that are two": (one(b"\0\1\2\1", dtype='"BOOL"'), "0 or 1"),
    "a shape of another size": (one(shape="[5]"), "5 bytes as its sizes say, got 4"),
    "a shape of no rank": (one(shape="[]"), "1 bytes as its sizes say, got 4"),
    "a negative size": (one(shape="[-4]"), _SIGN),
    "a size that is NaN": (one(shape="[NaN]"), _SIGN),
    "sizes whose product wraps": (one(shape=f"[{2**62},{2**62}]"), _BITS),
    "sizes whose product wraps to four": (one(shape=f"[{2**32},{2**32},4]"), _BITS),
    "none of very many": (one(b"", shape=f"[0,{2**62},8]", offsets="[0,0]"), _BITS),
    "many dimensions": (one(shape="[" + "1," * 16 + "4]"), "at most 16 dimensions, got more"),
    "very many dimensions": (one(shape="[" + "1," * _DEEP + "4]"), "at most 16 dimensions"),
    "very many offsets": (one(offsets="[" + "0," * _DEEP + "4]"), "at most 16 dimensions"),
    "a deep shape": (one(shape="[" * _DEEP), _SIGN),
    "deep metadata": (forged('{"__metadata__":' + '{"a":' * _DEEP), 'a "'),
    "another byte than UTF-8": (forged(b'{"\xff":{}}'), "UTF-8"),
    "an overlong letter": (forged(b'{"\xc0\x80":{}}'), "UTF-8"),
    "half a letter": (forged(b'{"\xc3":{}}'), "UTF-8"),
    "a letter cut off": (forged(b'{"\xe2\x82'), "UTF-8"),
    "a surrogate": (forged(b'{"\xed\xa0\x80":{}}'), "UTF-8"),
    "a letter beyond the last": (forged(b'{"\xf4\x90\x80\x80":{}}'), "UTF-8"),
    "half of a pair": (forged('{"\\ud800":{}}'), "both halves"),
    "a pair the other way": (forged('{"\\udc00\\ud800":{}}'), "both halves"),
    "another escape": (forged('{"\\x41":{}}'), "an escape that it knows"),
    "an escape cut off": (forged('{"\\'), "an escape that it knows"),
    "a short escape": (forged('{"\\u12'), "four digits"),
    "an escape with a sign": (forged('{"\\u+123":{}}'), "four digits"),
    "a control character": (forged(b'{"\n":{}}'), "without control characters"),
    "a zero in a name": (forged(b'{"\0":{}}'), "without control characters"),
    "another checksum": (about("{}").replace(MARK, MARK + b"f")[:-1], "checksum must"),
    "a short checksum": (forged('{"__metadata__":{"ctx.crc32":"0"}}'), "8 digits, got 0"),
    "an escaped checksum": (
        forged('{"__metadata__":{"ctx.crc32":"\\u0030\\u0030000000"}}'), "checksum must be",
    ),
}  # fmt: skip

#: The same of files whose JSON in the metadata is wrong: right for a reader of safetensors.
HOSTILE_ABOUT = {
    "no checksum": (forged('{"__metadata__":{"ctx":"{}"}}'), r"metadata must have ctx\.crc32"),
    "no metadata": (forged("{}"), "metadata must have ctx, got none"),
    "metadata without JSON": (about("", {}), "metadata must have ctx, got none"),
    "no JSON": (about(""), _WHOLE),
    "a list": (about("[]"), "a {"),
    "text behind it": (about("{} {}"), "an end"),
    "NaN": (about('{"a": NaN}'), _SIGN),
    "infinity": (about('{"a": -Infinity}'), _SIGN),
    "a word": (about('{"a": nothing}'), "a value"),
    "a large integer": (about(f'{{"a": {2**63}}}'), "fit into 64 bits"),
    "a large number": (about('{"a": 1e999}'), "fit into 64 bits"),
    "a point without digits": (about('{"a": 1.}'), _SIGN),
    "a name twice": (about('{"a": 1, "a": 1}'), "a name once"),
    "deep": (about('{"a": ' + "[" * _DEEP), "at most 16 levels"),
    "deep objects": (about('{"a":' * _DEEP), "at most 16 levels"),
    "a tensor of the same name": (
        about('{"a": 1}', more=',"a":' + entry(shape="[0]", offsets="[0,0]")), "twice: a",
    ),
}  # fmt: skip
