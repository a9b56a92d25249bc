"""Bundle -> artifact -> session -> images. BACKENDS has a line for each backend."""

BACKENDS = {
    "ort": "backends.ort:OrtBackend",
    "torch": "backends.torch:TorchBackend",
    "openvino": "backends.openvino:OpenVinoBackend",
    "optimum": "backends.optimum:OptimumBackend",
    "qnn": "backends.qnn:QnnBackend",
    "cuda": "backends.cuda:CudaBackend",
    "trt": "backends.trt:TrtBackend",
    "qaic": "backends.qaic:qaic",
    "null": "backends.null:NullBackend",
}
"""name -> "module:Class", imported only when the backend is asked for."""
