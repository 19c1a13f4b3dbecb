"The `semid` command."
