"""The configurations that are shipped; `--config demo` finds `demo.yaml` here."""
