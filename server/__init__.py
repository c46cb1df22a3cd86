"""Where shards live: Ray actors, their coordinator and process group, messages, launch and connect."""
