"""What the `trt` backend (backends/trt.py) is made of.

    probe.py     is TensorRT here, which version, on which GPU; how to get it
    request.py   what a plan is built for: graph form, shapes, flags; and its trtexec command
    log.py       TensorRT's messages: kept in a file, the errors read back
    timing.py    the timing cache: on disk, merged by every process
    build.py     graph -> plan
    device.py    memory, streams and CUDA graphs, through torch
    session.py   plan -> tensors in, tensors out

`log`, `timing`, `build` and `session` import tensorrt; the others do not.
"""
