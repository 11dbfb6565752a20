#!/bin/bash
# Written by oscar-submit. Each element of this job array takes shards of the folder and works on them until none is left.
{{directives}}

{{begin}}
tell_to_end() {
    kill -TERM "$child" 2>/dev/null
}

run {{command}}
