"""Compiled modules for tests: whole, counted, and in as little time as may be."""

import torch
from torch._dynamo.backends.registry import lookup_backend


class Compiled:
    """A module compiled whole, for any size if `dynamic`, and the number of graphs that this took.

    Its floats are constants of a graph. With `floats`, the compiler's default where sizes are
    dynamic, it takes them for inputs, finds that an operator wants constants, and traces all of
    it again.
    """

    def __init__(self, module, backend, *, dynamic=True, floats=False):
        torch._dynamo.reset()
        self.graphs = 0
        self.backend = lookup_backend(backend)
        options = {"fullgraph": True, "dynamic": dynamic}
        self.compiled = torch.compile(module, backend=self.compile, **options)
        self.constants = not floats

    def run(self, *args, **options):
        with torch._dynamo.config.patch(specialize_float=self.constants):
            return self.compiled(*args, **options)

    def compile(self, graph, inputs):
        self.graphs += 1
        return self.backend(graph, inputs)
