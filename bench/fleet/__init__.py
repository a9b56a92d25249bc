"""A sweep over machines: an engine that exists moves the calls, every machine measures itself."""
