"""What is trained or measured with the library and is not the library.

Text training and evaluation, the associative recall task, the ablation of compressors, the paper's
presets, and the run folders that they write. `python -m ctx` (`ctx.cli`) runs them; the library
imports neither.
"""
