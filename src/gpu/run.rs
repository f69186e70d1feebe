//! The runner: compiled programs, and the one encoder. Bind groups are made once, a step is one pass and one
//! submit, timestamps per op on request, readback is awaited.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::buffer::Buffer;
use super::device::Gpu;
use super::graph::{Graph, Node, Place, Tensor};
use super::kernel::{Pipeline, STEP_SLOT};
use super::plan::{Lifetime, Plan, plan};
use super::profile::Profile;
use crate::error::Result;

impl Gpu {
    /// The scalars of all steps of a run, one slot of [`STEP_SLOT`] bytes each.
    ///
    /// # Errors
    /// As [`Gpu::storage`].
    pub async fn steps<T: bytemuck::NoUninit>(&self, slots: &[T]) -> Result<Steps> {
        let bytes = slot_bytes(slots);
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let buffer = self.create_buffer("step scalars", bytes.len() as u64, usage).await?;
        buffer.write(&bytes);
        let device = &self.inner.device;
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some("step"),
            entries: &[wgpu::BindGroupLayoutEntry {
                binding: 0,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Uniform,
                    has_dynamic_offset: true,
                    min_binding_size: None,
                },
                count: None,
            }],
        });
        let binding = wgpu::BufferBinding { buffer: buffer.raw(), offset: 0, size: wgpu::BufferSize::new(STEP_SLOT) };
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("step"),
            layout: &layout,
            entries: &[wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::Buffer(binding) }],
        });
        Ok(Steps { group, buffer })
    }
}

/// The scalars of all steps, bound with a dynamic offset.
pub struct Steps {
    group: wgpu::BindGroup,
    buffer: Buffer,
}

impl Steps {
    /// Others in their place, no more than there were; takes effect before the next submit.
    pub fn write<T: bytemuck::NoUninit>(&self, slots: &[T]) {
        self.buffer.write(&slot_bytes(slots));
    }

    /// Bytes in device memory.
    pub fn bytes(&self) -> u64 {
        self.buffer.bytes()
    }
}

fn slot_bytes<T: bytemuck::NoUninit>(slots: &[T]) -> Vec<u8> {
    assert!(size_of::<T>() as u64 <= STEP_SLOT, "step scalars of {} bytes", size_of::<T>());
    let mut bytes = vec![0u8; slots.len().max(1) * STEP_SLOT as usize];
    for (slot, room) in slots.iter().zip(bytes.chunks_exact_mut(STEP_SLOT as usize)) {
        room[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(slot));
    }
    bytes
}

/// What one dispatch needs at encoding time.
struct Ready {
    pipeline: Arc<Pipeline>,
    /// `None` if it binds an argument: then the group is made at the first run with those buffers.
    group: Option<wgpu::BindGroup>,
}

/// A planned graph with its pipelines, buffers and bind groups, ready to be replayed.
pub struct Program {
    gpu: Gpu,
    graph: Graph,
    plan: Plan,
    slot_of: Vec<Option<usize>>,
    slots: Vec<Buffer>,
    dims: Buffer,
    /// Where each node's dims are in it.
    offsets: Vec<u64>,
    ready: Vec<Ready>,
    groups: HashMap<(usize, Vec<u64>), wgpu::BindGroup>,
    checked: bool,
}

/// Lifetimes of a graph's planned tensors, and which tensor each belongs to.
fn lifetimes(graph: &Graph) -> (Vec<Lifetime>, Vec<usize>) {
    let mut spans: Vec<Option<(usize, usize)>> = vec![None; graph.tensors.len()];
    for (at, node) in graph.nodes.iter().enumerate() {
        for tensor in node.reads.iter().chain(&node.writes) {
            let span = spans[tensor.id as usize].get_or_insert((at, at));
            span.1 = at;
        }
    }
    let planned = |(i, span): (usize, &Option<(usize, usize)>)| match (&graph.tensors[i].place, span) {
        (Place::Slot, Some((first, last))) => {
            Some((Lifetime { bytes: graph.tensors[i].tensor.bytes(), first: *first, last: *last }, i))
        }
        (Place::Sink, Some(_)) => {
            let last = graph.nodes.len() - 1;
            Some((Lifetime { bytes: graph.tensors[i].tensor.bytes(), first: 0, last }, i))
        }
        _ => None,
    };
    spans.iter().enumerate().filter_map(planned).unzip()
}

impl Graph {
    /// The plan of this graph: slots for its activations. Pure.
    pub fn plan(&self) -> Plan {
        plan(&lifetimes(self).0)
    }

    /// Bytes that a [`Program`] of this graph will allocate: slots and dims. Weights and other bound buffers exist already.
    pub fn planned_bytes(&self, uniform_alignment: u32) -> u64 {
        let slots = self.plan().slots.iter().map(|s| s.max(&16).next_multiple_of(16)).sum::<u64>();
        slots + dims_offsets(self, uniform_alignment).1
    }
}

/// Byte offset of each node's dims in the one dims buffer, and its size.
fn dims_offsets(graph: &Graph, alignment: u32) -> (Vec<u64>, u64) {
    let mut end = 0;
    let offsets = graph.nodes.iter().map(|node| {
        let at = u64::next_multiple_of(end, u64::from(alignment));
        end = at + (node.dims.len() as u64 * 4).next_multiple_of(16);
        at
    });
    (offsets.collect(), end.max(16))
}

impl Program {
    /// Plan, check against the device, compile, allocate, bind.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] before anything is allocated; [`Error::OutOfMemory`]; [`Error::Device`].
    pub async fn new(gpu: &Gpu, graph: Graph) -> Result<Program> {
        let mut program = Program::unbound(gpu, graph).await?;
        program.bind().await?;
        Ok(program)
    }

    /// As [`Program::new`], but nothing is bound: [`Program::prepare`] does that, or [`Program::prepare_nodes`] part by part.
    ///
    /// # Errors
    /// As [`Program::new`].
    pub async fn unbound(gpu: &Gpu, graph: Graph) -> Result<Program> {
        let (lives, owners) = lifetimes(&graph);
        let plan = plan(&lives);
        for &i in &owners {
            let info = &graph.tensors[i];
            gpu.check_size(&format!("{} of shape {:?}", info.label, info.tensor.dims), info.tensor.bytes())?;
        }
        let needed = graph.planned_bytes(gpu.caps().uniform_alignment);
        gpu.check_memory(
            "this picture",
            needed,
            "ask for a smaller picture or batch, or choose another device with --device",
        )?;
        let mut slot_of = vec![None; graph.tensors.len()];
        for (life, &i) in owners.iter().enumerate() {
            slot_of[i] = Some(plan.slot_of[life]);
        }
        let mut slots = Vec::new();
        for &bytes in &plan.slots {
            slots.push(gpu.scratch("activations", bytes).await?);
        }
        let (offsets, size) = dims_offsets(&graph, gpu.caps().uniform_alignment);
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let dims = gpu.create_buffer("dims", size, usage).await?;
        let mut words = vec![0u32; dims.bytes() as usize / 4];
        for (node, &offset) in graph.nodes.iter().zip(&offsets) {
            words[offset as usize / 4..][..node.dims.len()].copy_from_slice(&node.dims);
        }
        dims.write(&words);
        let (gpu, checked) = (gpu.clone(), gpu.inner.checked);
        let (ready, groups) = Default::default();
        let mut program = Program { gpu, graph, plan, slot_of, slots, dims, offsets, ready, groups, checked };
        program.compile().await?;
        Ok(program)
    }

    /// The same program, its kernels built with all of wgpu's runtime checks: what it computes must be the same.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub async fn with_checks(mut self) -> Result<Program> {
        self.checked = true;
        self.compile().await?;
        self.bind().await?;
        Ok(self)
    }

    async fn compile(&mut self) -> Result<()> {
        let kernels = self.graph.nodes.iter().map(|node| (&node.kernel, node.interface()));
        let pipelines = self.gpu.pipelines(kernels, self.checked).await?;
        self.groups.clear();
        self.ready = pipelines.into_iter().map(|pipeline| Ready { pipeline, group: None }).collect();
        Ok(())
    }

    /// Bind all that binds no argument.
    async fn bind(&mut self) -> Result<()> {
        let own: Vec<usize> = (0..self.ready.len()).filter(|&at| !self.has_arguments(&self.graph.nodes[at])).collect();
        self.bind_nodes(own, &[]).await
    }

    /// Bytes of its own buffers: slots and dims.
    pub fn bytes(&self) -> u64 {
        self.slots.iter().map(Buffer::bytes).sum::<u64>() + self.dims.bytes()
    }

    /// Bytes of the planned slots.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The recording.
    pub fn nodes(&self) -> &[Node] {
        &self.graph.nodes
    }

    fn has_arguments(&self, node: &Node) -> bool {
        let is_argument = |t: &Tensor| matches!(self.graph.tensors[t.id as usize].place, Place::Argument(_));
        node.reads.iter().chain(&node.writes).any(is_argument)
    }

    fn buffer<'a>(&'a self, tensor: &Tensor, arguments: &'a [&'a Buffer]) -> &'a Buffer {
        let info = &self.graph.tensors[tensor.id as usize];
        match &info.place {
            Place::Buffer(buffer) => buffer,
            Place::Argument(position) => arguments[*position],
            Place::Slot | Place::Sink => match self.slot_of[tensor.id as usize] {
                Some(slot) => &self.slots[slot],
                None => unreachable!("tensor {} is bound, so it has a slot", info.label),
            },
        }
    }

    /// Bind nodes, in one validation scope: a thousand of them take longer.
    async fn bind_nodes(&mut self, nodes: Vec<usize>, arguments: &[&Buffer]) -> Result<()> {
        let device = &self.gpu.inner.device;
        let (groups, error) = {
            let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
            let groups: Vec<_> = nodes.iter().map(|&at| self.bind_group(at, arguments)).collect();
            (groups, scope.pop())
        };
        let Some(error) = error.await else {
            let key: Vec<u64> = arguments.iter().map(|b| b.id()).collect();
            for (at, group) in nodes.into_iter().zip(groups) {
                if self.has_arguments(&self.graph.nodes[at]) {
                    self.groups.insert((at, key.clone()), group);
                } else {
                    self.ready[at].group = Some(group);
                }
            }
            return Ok(());
        };
        // Which one?
        for at in nodes {
            let error = {
                let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
                drop(self.bind_group(at, arguments));
                scope.pop()
            };
            if let Some(error) = error.await {
                let node = &self.graph.nodes[at];
                return Err(self.gpu.refused(format!("{}/{} {}", node.op, node.variant, node.shapes()), &error));
            }
        }
        Err(self.gpu.refused("the buffers of a program".into(), &error))
    }

    /// The bind group of node `at`.
    fn bind_group(&self, at: usize, arguments: &[&Buffer]) -> wgpu::BindGroup {
        let (node, offset, pipeline) = (&self.graph.nodes[at], self.offsets[at], &self.ready[at].pipeline);
        let tensors = || node.reads.iter().chain(&node.writes);
        let entry = |(binding, resource)| wgpu::BindGroupEntry { binding: binding as u32, resource };
        let mut resources: Vec<wgpu::BindingResource<'_>> =
            tensors().map(|t| self.buffer(t, arguments).raw().as_entire_binding()).collect();
        resources.push(wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: self.dims.raw(),
            offset,
            size: wgpu::BufferSize::new((node.dims.len() as u64 * 4).next_multiple_of(16)),
        }));
        let entries: Vec<_> = resources.into_iter().enumerate().map(entry).collect();
        let descriptor =
            wgpu::BindGroupDescriptor { label: Some(node.op), layout: &pipeline.layout, entries: &entries };
        self.gpu.inner.device.create_bind_group(&descriptor)
    }

    /// Make the bind groups for these arguments, if they are new; they are kept.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub async fn prepare(&mut self, arguments: &[&Buffer]) -> Result<()> {
        self.prepare_nodes(arguments, 0..self.ready.len()).await
    }

    /// As [`Program::prepare`], of some nodes.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub async fn prepare_nodes(&mut self, arguments: &[&Buffer], nodes: Range<usize>) -> Result<()> {
        assert_eq!(arguments.len(), self.graph.arguments, "arguments of a program");
        let key: Vec<u64> = arguments.iter().map(|b| b.id()).collect();
        let new = |at: &usize| self.ready[*at].group.is_none() && !self.groups.contains_key(&(*at, key.clone()));
        self.bind_nodes(nodes.filter(new).collect(), arguments).await
    }
}

impl Program {
    /// Milliseconds of `times` runs after each other in one pass, with slot 0 of the scalars: between timestamps, or where the device has
    /// none from submission to the end. [`Program::prepare`] must have seen these arguments.
    ///
    /// # Errors
    /// [`Error::DeviceLost`].
    pub async fn time(&self, arguments: &[&Buffer], steps: &Steps, times: usize) -> Result<f64> {
        let gpu = &self.gpu;
        let device = &gpu.inner.device;
        let mut recording = gpu.record(false);
        let descriptor = wgpu::QuerySetDescriptor { label: None, ty: wgpu::QueryType::Timestamp, count: 2 };
        let queries = gpu.caps().timestamps.then(|| device.create_query_set(&descriptor));
        if let Some(query_set) = &queries {
            let timestamp_writes = Some(wgpu::ComputePassTimestampWrites {
                query_set,
                beginning_of_pass_write_index: Some(0),
                end_of_pass_write_index: Some(1),
            });
            drop(recording.pass.take());
            let descriptor = wgpu::ComputePassDescriptor { label: Some("timed"), timestamp_writes };
            recording.pass = Some(recording.encoder.begin_compute_pass(&descriptor).forget_lifetime());
        }
        for _ in 0..times {
            recording.run(self, arguments, steps, 0);
        }
        drop(recording.pass.take());
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let resolved = gpu.create_buffer("timestamps", 16, usage).await?;
        if let Some(queries) = &queries {
            recording.encoder.resolve_query_set(queries, 0..2, resolved.raw(), 0);
        }
        let since = web_time::Instant::now();
        gpu.inner.queue.submit([recording.encoder.finish()]);
        gpu.wait().await?;
        if queries.is_none() {
            return Ok(since.elapsed().as_secs_f64() * 1e3);
        }
        let ticks: Vec<u64> = resolved.read(2).await?;
        Ok(ticks[1].saturating_sub(ticks[0]) as f64 * f64::from(gpu.inner.queue.get_timestamp_period()) / 1e6)
    }
}

/// One step being encoded: any number of programs, one pass, one submit.
pub struct Recording {
    gpu: Gpu,
    encoder: wgpu::CommandEncoder,
    pass: Option<wgpu::ComputePass<'static>>,
    timed: Option<Timed>,
}

/// Timestamps of the recording: one pass per dispatch instead of one for all.
struct Timed {
    /// As many as the dispatches need, [`MAX_QUERIES`] each.
    queries: Vec<wgpu::QuerySet>,
    ops: Vec<TimedOp>,
}

/// Op, variant, shapes and floating-point operations of a dispatch.
type TimedOp = (&'static str, &'static str, String, u64);

/// Queries of one set; wgpu allows no more.
const MAX_QUERIES: u32 = 4096;

impl Gpu {
    /// Begin a step. With `timed`, every dispatch gets a pass of its own with timestamps (slower).
    pub fn record(&self, timed: bool) -> Recording {
        let device = &self.inner.device;
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("step") });
        let timed = (timed && self.caps().timestamps).then(|| Timed { queries: Vec::new(), ops: Vec::new() });
        let pass = match timed {
            Some(_) => None,
            None => Some(encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()).forget_lifetime()),
        };
        Recording { gpu: self.clone(), encoder, pass, timed }
    }
}

impl Recording {
    /// Encode a program with slot `step` of the scalars. [`Program::prepare`] must have seen these arguments.
    pub fn run(&mut self, program: &Program, arguments: &[&Buffer], steps: &Steps, step: usize) {
        self.run_nodes(program, arguments, (steps, step), 0..program.ready.len());
    }

    /// As [`Recording::run`], some nodes: all must be, in order.
    pub fn run_nodes(
        &mut self,
        program: &Program,
        arguments: &[&Buffer],
        (steps, step): (&Steps, usize),
        nodes: Range<usize>,
    ) {
        let key: Vec<u64> = arguments.iter().map(|b| b.id()).collect();
        for at in nodes {
            let (node, ready) = (&program.graph.nodes[at], &program.ready[at]);
            let group = ready.group.as_ref().or_else(|| program.groups.get(&(at, key.clone())));
            let Some(group) = group else { unreachable!("{}: prepare was not called with these arguments", node.op) };
            let offset = [(step as u64 * STEP_SLOT) as u32];
            let encode = |pass: &mut wgpu::ComputePass<'_>| {
                pass.set_pipeline(&ready.pipeline.raw);
                pass.set_bind_group(0, group, &[]);
                if node.step {
                    pass.set_bind_group(1, &steps.group, &offset);
                }
                pass.dispatch_workgroups(node.grid[0], node.grid[1], node.grid[2]);
            };
            match (&mut self.pass, &mut self.timed) {
                (Some(pass), _) => encode(pass),
                (None, Some(timed)) => {
                    let first = timed.ops.len() as u32 * 2 % MAX_QUERIES;
                    if first == 0 {
                        let ty = wgpu::QueryType::Timestamp;
                        let descriptor = wgpu::QuerySetDescriptor { label: None, ty, count: MAX_QUERIES };
                        timed.queries.push(self.gpu.inner.device.create_query_set(&descriptor));
                    }
                    timed.ops.push((node.op, node.variant, node.shapes(), node.flops));
                    let timestamp_writes = timed.queries.last().map(|query_set| wgpu::ComputePassTimestampWrites {
                        query_set,
                        beginning_of_pass_write_index: Some(first),
                        end_of_pass_write_index: Some(first + 1),
                    });
                    let descriptor = wgpu::ComputePassDescriptor { label: Some(node.op), timestamp_writes };
                    encode(&mut self.encoder.begin_compute_pass(&descriptor));
                }
                (None, None) => unreachable!("a recording has a pass or timestamps"),
            }
        }
    }

    /// Submit the step. With timestamps, awaits them and adds them to `profile`.
    ///
    /// # Errors
    /// [`Error::DeviceLost`].
    pub async fn submit(mut self, profile: Option<&mut Profile>) -> Result<()> {
        drop(self.pass.take());
        if self.timed.as_ref().is_none_or(|timed| timed.ops.is_empty()) {
            self.gpu.inner.queue.submit([self.encoder.finish()]);
            return self.gpu.check_alive();
        }
        let (ops, times) = self.timed_ops().await?;
        if let Some(profile) = profile {
            for ((op, variant, shapes, flops), ms) in ops.into_iter().zip(times) {
                profile.add(op, variant, shapes, ms, flops);
            }
        }
        Ok(())
    }

    /// Submit a timed recording and await the milliseconds of its dispatches, in order; none where the device does not tell.
    ///
    /// # Errors
    /// [`Error::DeviceLost`].
    pub async fn times(self) -> Result<Vec<f64>> {
        Ok(self.timed_ops().await?.1)
    }

    async fn timed_ops(mut self) -> Result<(Vec<TimedOp>, Vec<f64>)> {
        let gpu = self.gpu;
        let Some(timed) = self.timed.take() else { return Ok(Default::default()) };
        let count = timed.ops.len() * 2;
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let resolved = gpu.create_buffer("timestamps", count as u64 * 8, usage).await?;
        for (i, set) in timed.queries.iter().enumerate() {
            let first = i as u32 * MAX_QUERIES;
            let queries = 0..(count as u32 - first).min(MAX_QUERIES);
            self.encoder.resolve_query_set(set, queries, resolved.raw(), u64::from(first) * 8);
        }
        gpu.inner.queue.submit([self.encoder.finish()]);
        let ticks: Vec<u64> = resolved.read(count).await?;
        let period = f64::from(gpu.inner.queue.get_timestamp_period());
        let ms = |pair: &[u64]| pair[1].saturating_sub(pair[0]) as f64 * period / 1e6;
        Ok((timed.ops, ticks.chunks_exact(2).map(ms).collect()))
    }
}
