"""The sweep of the CUDA kernels' block sizes: `python -m qwen_runner.kernels.tune --help`.

Its results are the tables `kernels/<operator>/tuned.inc`, a section for each GPU architecture, which are
compiled into the runner. The kernels belong to the runner, not to a program, so that the section is chosen
when a kernel is launched, by the GPU it runs on, and no program has to be exported again for another GPU.
"""
