"""What the backend `ort` is made of beside its compiler: sessions, and operators of our own."""
