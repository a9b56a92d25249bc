"""What `addbench gpu-check` is made of.

checks.py    the child process on the device: runs the three below, writes what they give
sanity.py    the device, what it can do at most, whether a captured graph does what it should
parity.py    FP16 against FP32 on the device, one captured graph against step by step
profile.py   time by part and by kernel, against the floor
report.py    goals, and all of it as text
"""
