"""Bundle -> artifact -> session -> images. BACKENDS has a line for each backend."""

BACKENDS = {
    "ort": "backends.ort:OrtBackend",
    "torch": "backends.torch:TorchBackend",
    "null": "backends.null:NullBackend",
}
"""name -> "module:Class", imported only when the backend is asked for."""
