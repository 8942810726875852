"""Kernels compiled ahead of time, without a GPU: what `fastflow compile` does, and how its output is found at run time.

targets      architectures by name, and what bounds a multiprocessor's occupancy
variants     the calls whose launches are compiled: what rollouts, `ff.step`, `ff.log_prob` and the losses ask for
triton_aot   runs those launches under a stand-in for the driver, so that cache keys are the launcher's own
nvcc_aot     the CUDA module for the same list, by the builder of setup.py
cache        the folder: a manifest an architecture, checked in words before its kernels are loaded
module       the same of the CUDA module
resources    registers, spills, memory and widths of loads, read from the compiled code
report       all of it as a table or as JSON
"""
