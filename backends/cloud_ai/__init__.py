"""Cloud AI 100: the real toolchain. The registered backend is backends/qaic.py.

    options.py    what a person may set
    probe.py      what this host has: SDK, compiler and its version, cards, permissions, runtimes
    power.py      what a card draws, and which card it is
    presets.py    compiler settings for each card, part and batch, and where they come from
    spec.py       a compile as data, and its exact argument list in either compiler's dialect
    compiler.py   runs the compiler; keeps its output; explains its failures
    figures.py    what compiler and runner print, as figures
    qpc.py        the compiled file: its magic and versions
    runtimes.py   one program on one device: over qaic, qaicrt or ONNX Runtime's QAic EP
    session.py    a part over one of these
    lanes.py      prompts over several devices: side by side, as one batch, or parts spread out
    dryrun.py     the whole of it for a person who has the SDK: graphs, manifest and
    script.py     a shell script that needs nothing of ours

Nothing in here has met a card. Facts of the toolchain are from Qualcomm's public material: the
SDK's documentation, `quic/cloud-ai-sdk` (the SDXL-Turbo recipe), `quic/efficient-transformers`
and the open runtime. Nothing runs at import; nothing needs root.
"""
