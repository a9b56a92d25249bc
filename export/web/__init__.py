"""Bundle to a static folder: the same model in the browser, without a server.

`site` builds the folder, of graphs that `export.lower` lowers, of `modules/` (plain ES modules, no
build step), of the scheduler's constants (`schedule`) and of the runtime's files (`runtime`), which
npm brings at a pinned version and hash and which are never part of the checkout.
"""
