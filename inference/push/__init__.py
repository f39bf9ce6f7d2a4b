"""Work that is asked for by a call: a job runs when somebody says so, instead of when the next poll finds it."""
