"""Files: read within limits, written atomically; JSON, YAML and safetensors."""
