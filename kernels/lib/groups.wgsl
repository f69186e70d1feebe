// Which groups four channels are of, for kernels whose workgroups have a span of groups: as few as have whole groups of four channels, and
// whole pieces of memory. Four channels are of two groups at most: groups have three channels or more. Needs dims.group.

// The group of the first of four channels, counted from the span's first.
fn first_group(column: u32) -> u32 { return column * 4u / dims.group; }

// Which of four channels are of the next group.
fn in_next(column: u32, group: u32) -> vec4<bool> {
    return vec4<u32>(column * 4u) + vec4<u32>(0u, 1u, 2u, 3u) >= vec4<u32>((group + 1u) * dims.group);
}
