"""From the pictures and texts that people have to training samples: readers, `prepare`, token
shards.
"""
