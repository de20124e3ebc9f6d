"""Calls on CUDA tensors that have no numbers, on a machine without a GPU: nothing that a step does
mixes devices or asks the device for a number, which would wait for it and fit no graph.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ctx import _load
from device_streams import STREAMS, WIDTH, B, layer_stream, rows_of

DEVICE = torch.device("cuda:0")


pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")


@pytest.fixture
def fake():
    with FakeTensorMode() as mode:
        yield mode


@pytest.mark.parametrize("kind", ["plain", "lengths", "reset_at"])
@pytest.mark.parametrize("name", STREAMS)
def test_step(fake, name, kind):
    if name.startswith("memory") and not _load.build_info["cuda"]:
        pytest.skip("this build has no CUDA kernels")
    if name == "memory, alibi":
        pytest.skip("slopes are read when the memory is made")
    rows = rows_of(kind, DEVICE)
    with torch.no_grad():
        stream = STREAMS[name](DEVICE)
        out = stream.call(**rows)
    assert out.device == DEVICE and out.shape[0] == B


@pytest.mark.parametrize("position", ["rotary", "alibi", "relative"])
def test_call_under_grad(fake, position):
    """Its forward: autograd's engine wants a GPU for the backward."""
    layer, carried = layer_stream(DEVICE, position=position).step, None
    for kind in ("plain", "lengths", "reset_at", "mask"):
        x = torch.randn(B, 40, WIDTH, device=DEVICE, requires_grad=True)
        y, carried = layer(x, carried, **rows_of(kind, DEVICE, 40))
        assert y.device == carried.seen.device == DEVICE and y.requires_grad
