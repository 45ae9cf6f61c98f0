"""What a search leaves on disk, and how it survives anything: numpy and the standard library alone.

atomic        a file is the old one or the new one, never half of each
strict_json   JSON with exactly one spelling
container     named arrays in one safetensors file, every byte under a sha256
codec         an array as entropy-coded byte planes
ticket        search.ticket: rewind values once, and for every weight the round it died in
lock          one writer per run
metrics_file  metrics.jsonl, append-only, cut to a saved length on resume
run           the run directory
"""
