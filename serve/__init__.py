"""Bundle to pictures over HTTP and WebSocket: a page that keeps up with typing, and an API.

`app` puts it together. The parent process (`engine`, `waiting`, `api`, `live`) never computes and
never imports torch; a child process per device (`worker`, `artist`) draws.
"""
