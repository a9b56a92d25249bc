"""Changes to the smoke preset that make it a matter of seconds."""

SMALL = [
    argument
    for change in (
        "data.pool=96",
        "autoencoder.iterations=6",
        "tiny-autoencoder.iterations=3",
        "features.iterations=3",
        "fid.iterations=3",
        "teacher.iterations=4",
        "teacher.steps=2",
        "student.iterations=3",
        "evaluate-captions=6",
    )
    for argument in ("--set", change)
]
