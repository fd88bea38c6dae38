def compare(a): return {}
