//! Runs conformance cases through this crate: cases on standard input, one line each, to results on standard output, one line each.
//!
//! ```text
//! cargo run --example conformance -- DEVICE THREADS < cases.jsonl
//! ```
//!
//! What a case says and what a result says is in docs/conformance.md. What cannot be said with this crate's types is skipped.

use std::error::Error;
use std::io::{BufRead, BufWriter, Write};

use half::{bf16, f16};
use mfa::{
    Alignment, Attention, Device, Element, Gradients, Granularity, Int4Pair, MfaContext, OperandScheme, Partial, Quantization,
    QuantizationConfig, QuantizationScheme, Statistics, StatisticsMut, TensorView, TensorViewMut,
};

/// Why a case has no results.
enum Failure {
    Inexpressible(String),
    Refused(mfa::Error),
}

impl From<mfa::Error> for Failure {
    fn from(error: mfa::Error) -> Self {
        Self::Refused(error)
    }
}

fn inexpressible<T>(why: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Inexpressible(why.into()))
}

type Done<T = ()> = Result<T, Failure>;

// ---- A case: one line of JSON without nesting, in which no text contains a quotation mark ------------------------------------------------

#[derive(Clone, Copy)]
struct Case<'a>(&'a str);

impl<'a> Case<'a> {
    /// What follows a field's name.
    fn find(self, name: &str) -> Option<&'a str> {
        let pattern = format!("\"{name}\": ");
        self.0.find(&pattern).map(|at| &self.0[at + pattern.len()..])
    }

    fn text(self, name: &str) -> &'a str {
        self.find(name).and_then(|at| at.strip_prefix('"')).and_then(|at| at.split('"').next()).unwrap_or("")
    }

    /// A number, as it is written; "nan" and "inf" are texts.
    fn number(self, name: &str) -> Option<&'a str> {
        let at = self.find(name)?.trim_start_matches('"');
        Some(&at[..at.find([',', '}', '"']).unwrap_or(at.len())])
    }

    fn parsed<T: std::str::FromStr>(self, name: &str, otherwise: T) -> T {
        self.number(name).and_then(|text| text.trim().parse().ok()).unwrap_or(otherwise)
    }

    fn size(self, name: &str, otherwise: usize) -> usize {
        self.parsed(name, otherwise)
    }

    fn is_true(self, name: &str) -> bool {
        self.number(name) == Some("true")
    }

    fn list(self, name: &str) -> Option<Vec<i64>> {
        let list = self.find(name)?.strip_prefix('[')?;
        Some(list[..list.find(']')?].split(',').filter_map(|number| number.trim().parse().ok()).collect())
    }
}

// ---- Inputs ------------------------------------------------------------------------------------------------------------------------------

const GRAD_OUTPUT: u64 = 3;
const GRAD_LOGSUMEXP: u64 = 4;
const MASK: u64 = 5;
const SINKS: u64 = 6;
const ALIBI_SLOPES: u64 = 7;
const SCALES: u64 = 16;
const ZERO_POINTS: u64 = 32;
const CHANNEL_MEANS: u64 = 48;
const MOST_ELEMENTS: usize = 1 << 22;

fn word(seed: u64, stream: u64, index: usize) -> u64 {
    let place = (index as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut z = place.wrapping_add(seed.wrapping_mul(256).wrapping_add(stream).wrapping_mul(0xBF58_476D_1CE4_E5B9));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn sum(word: u64) -> i32 {
    ((word & 0xFFFF) + (word >> 16 & 0xFFFF) + (word >> 32 & 0xFFFF) + (word >> 48)) as i32
}

fn real(word: u64) -> f32 {
    (sum(word) - 131_070) as f32 / 32_768.0
}

fn short_real(word: u64) -> f32 {
    ((sum(word) >> 10) - 128) as f32 / 32.0
}

/// The number of a word in a type of elements; the bytes that results are made of; what they are before.
trait Number: Element {
    const BEFORE: Self;
    const MINUS_INFINITY: Option<Self> = None;
    fn of_word(word: u64) -> Self;
    /// Gives the channel at a place the number of a word.
    fn put(values: &mut [Self], place: usize, word: u64) {
        values[place] = Self::of_word(word);
    }
    fn bytes(self) -> impl AsRef<[u8]>;
}

macro_rules! numbers {
    ($($type:ty, $before:expr, $of_word:expr, $infinity:expr);* $(;)?) => {$(
        impl Number for $type {
            const BEFORE: Self = $before;
            const MINUS_INFINITY: Option<Self> = $infinity;
            fn of_word(word: u64) -> Self {
                let of_word: fn(u64) -> Self = $of_word;
                of_word(word)
            }
            fn bytes(self) -> impl AsRef<[u8]> {
                self.to_ne_bytes()
            }
        }
    )*};
}
numbers! {
    f32, f32::from_bits(0xA5A5_A5A5), real, Some(f32::NEG_INFINITY);
    f64, f64::from_bits(0xA5A5_A5A5_A5A5_A5A5), |word| f64::from(real(word)), Some(f64::NEG_INFINITY);
    f16, f16::from_bits(0xA5A5), |word| f16::from_f32(short_real(word)), Some(f16::NEG_INFINITY);
    bf16, bf16::from_bits(0xA5A5), |word| bf16::from_f32(short_real(word)), Some(bf16::NEG_INFINITY);
    i8, -0x5B, |word| ((word >> 56) as i32 - 128) as i8, None;
}

impl Number for Int4Pair {
    const BEFORE: Self = Int4Pair(0xA5);
    /// The pair of an even channel whose odd one is 0.
    fn of_word(word: u64) -> Self {
        Int4Pair::new(((word >> 60) as i32 - 8) as i8, 0)
    }
    /// The even channel of a pair comes before the odd one.
    fn put(values: &mut [Self], place: usize, word: u64) {
        let code = Self::of_word(word);
        values[place / 2] = if place % 2 == 0 { code } else { Self::new(values[place / 2].even(), code.even()) };
    }
    fn bytes(self) -> impl AsRef<[u8]> {
        [self.0]
    }
}

impl Number for bool {
    const BEFORE: Self = true;
    fn of_word(word: u64) -> Self {
        word >> 62 != 0
    }
    fn bytes(self) -> impl AsRef<[u8]> {
        [u8::from(self)]
    }
}

/// The hash of results' bytes.
fn hash_of<B: AsRef<[u8]>>(parts: impl IntoIterator<Item = B>) -> u64 {
    let step = |hash: u64, byte: &u8| hash.wrapping_mul(0x0100_0000_01B3).wrapping_add(u64::from(*byte));
    parts.into_iter().fold(0xCBF2_9CE4_8422_2325, |hash, part| part.as_ref().iter().fold(hash, step))
}

fn elements_of(sizes: &[usize]) -> Done<usize> {
    if sizes.contains(&0) {
        return Ok(0);
    }
    match sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size)) {
        Some(elements) if elements <= MOST_ELEMENTS => Ok(elements),
        _ => inexpressible("slices of this size do not exist"),
    }
}

macro_rules! values {
    ($($variant:ident($type:ty) = $name:literal),*) => {
        /// Elements of any type.
        enum Values {
            $($variant(Vec<$type>)),*
        }

        impl Values {
            /// So many elements as they are before a call.
            fn before(name: &str, elements: usize) -> Done<Self> {
                match name {
                    $($name => Ok(Self::$variant(vec![<$type>::BEFORE; elements])),)*
                    _ => inexpressible(format!("there is no type {name:?}")),
                }
            }

            /// Gives the element at `place(n)` the number of the word `n`.
            fn fill(&mut self, elements: usize, place: impl Fn(usize) -> usize, word: impl Fn(usize) -> u64) {
                match self {
                    $(Self::$variant(values) => (0..elements).for_each(|n| <$type>::put(values, place(n), word(n))),)*
                }
            }

            /// What an additive mask excludes.
            fn exclude(&mut self, word: impl Fn(usize) -> u64) {
                match self {
                    $(Self::$variant(values) => if let Some(infinity) = <$type>::MINUS_INFINITY {
                        let excluded = values.iter_mut().enumerate().filter(|(n, _)| word(*n) >> 61 == 0);
                        excluded.for_each(|(_, value)| *value = infinity);
                    })*
                }
            }

            fn hash(&self) -> u64 {
                match self {
                    $(Self::$variant(values) => hash_of(values.iter().map(|value| value.bytes())),)*
                }
            }

            fn view(&self, shape: [usize; 4], tokens_first: bool) -> mfa::Result<TensorView<'_>> {
                match self {
                    $(Self::$variant(values) => {
                        if tokens_first { TensorView::new_bshd(values, swapped(shape)) } else { TensorView::new(values, shape) }
                    })*
                }
            }

            fn view_mut(&mut self, shape: [usize; 4], tokens_first: bool) -> mfa::Result<TensorViewMut<'_>> {
                match self {
                    $(Self::$variant(values) => {
                        if tokens_first { TensorViewMut::new_bshd(values, swapped(shape)) } else { TensorViewMut::new(values, shape) }
                    })*
                }
            }
        }
    };
}
values! {
    Fp32(f32) = "float32", Fp64(f64) = "float64", Fp16(f16) = "float16", Bf16(bf16) = "bfloat16", Int8(i8) = "int8",
    Int4(Int4Pair) = "int4", Bool(bool) = "bool"
}

fn swapped([batch, heads, tokens, channels]: [usize; 4]) -> [usize; 4] {
    [batch, tokens, heads, channels]
}

/// A contiguous tensor in the case's layout.
struct Tensor {
    values: Values,
    shape: [usize; 4],
    tokens_first: bool,
}

impl Tensor {
    /// Filled from `stream`; None: for results.
    fn new(case: Case, precision: &str, shape: [usize; 4], stream: Option<u64>) -> Done<Self> {
        let [batch, heads, tokens, channels] = shape;
        let elements = elements_of(&shape)?;
        let (row, per_value) = if precision == "int4" { (channels.next_multiple_of(2), 2) } else { (channels, 1) };
        let mut values = Values::before(precision, elements_of(&[batch, heads, tokens, row])? / per_value)?;
        let tokens_first = case.text("layout") == "bshd";
        if let Some(stream) = stream {
            let place = |n: usize| {
                let (d, s, h, b) = (n % channels, n / channels % tokens, n / channels / tokens % heads, n / channels / tokens / heads);
                (if tokens_first { (b * tokens + s) * heads + h } else { (b * heads + h) * tokens + s }) * row + d
            };
            let seed = case.parsed("input_seed", 0);
            values.fill(elements, place, |n| word(seed, stream, n));
        }
        Ok(Self { values, shape, tokens_first })
    }

    fn mask(case: Case) -> Done<Self> {
        let mut shape = [1; 4];
        for (size, given) in shape.iter_mut().zip(case.list("mask_shape").unwrap_or_default()) {
            *size = given as usize;
        }
        let elements = elements_of(&shape)?;
        let seed = case.parsed("input_seed", 0);
        let mut values = Values::before(case.text("mask"), elements)?;
        values.fill(elements, |n| n, |n| word(seed, MASK, n));
        values.exclude(|n| word(seed, MASK, n));
        Ok(Self { values, shape, tokens_first: false })
    }

    fn view(&self) -> mfa::Result<TensorView<'_>> {
        self.values.view(self.shape, self.tokens_first)
    }

    fn view_mut(&mut self) -> mfa::Result<TensorViewMut<'_>> {
        self.values.view_mut(self.shape, self.tokens_first)
    }
}

/// Numbers a row or a head.
enum Numbers {
    Fp32(Vec<f32>),
    Fp64(Vec<f64>),
}

impl Numbers {
    /// From `stream`; None: for results.
    fn new(case: Case, count: usize, is_double: bool, stream: Option<u64>) -> Self {
        let seed = case.parsed("input_seed", 0);
        let number = |n: usize| {
            let stream = stream?;
            let word = word(seed, stream, n);
            Some(if stream == ALIBI_SLOPES { (1 + (word >> 61)) as f32 / 16.0 } else { real(word) })
        };
        if is_double {
            Self::Fp64((0..count).map(|n| number(n).map_or(f64::BEFORE, f64::from)).collect())
        } else {
            Self::Fp32((0..count).map(|n| number(n).unwrap_or(f32::BEFORE)).collect())
        }
    }

    fn view(&self) -> Statistics<'_> {
        match self {
            Self::Fp32(numbers) => numbers.into(),
            Self::Fp64(numbers) => numbers.into(),
        }
    }

    fn view_mut(&mut self) -> StatisticsMut<'_> {
        match self {
            Self::Fp32(numbers) => numbers.into(),
            Self::Fp64(numbers) => numbers.into(),
        }
    }

    fn hash(&self) -> u64 {
        match self {
            Self::Fp32(numbers) => hash_of(numbers.iter().map(|number| number.to_ne_bytes())),
            Self::Fp64(numbers) => hash_of(numbers.iter().map(|number| number.to_ne_bytes())),
        }
    }
}

fn granularity(case: Case, operand: &str) -> Done<Granularity> {
    Ok(match case.text(&format!("{operand}_granularity")) {
        "tensor" => Granularity::Tensor,
        "head" => Granularity::Head,
        "token" => Granularity::Token,
        "block" => Granularity::block(case.parsed(&format!("{operand}_block_size"), 1))?,
        "channel" => Granularity::Channel,
        "group" => Granularity::group(case.parsed(&format!("{operand}_group_size"), 1))?,
        other => return inexpressible(format!("there is no granularity {other:?}")),
    })
}

/// What codes stand for.
struct Parts {
    granularity: Granularity,
    scales: Vec<f32>,
    zero_points: Option<Vec<i32>>,
    channel_means: Option<Vec<f32>>,
    rotated: bool,
}

/// Query, key, value, or what is dequantised.
struct Operand {
    tensor: Tensor,
    parts: Option<Parts>,
}

impl Operand {
    fn new(case: Case, name: &str, shape: [usize; 4], number: u64) -> Done<Self> {
        let tensor = Tensor::new(case, case.text(name), shape, Some(number))?;
        if case.find(&format!("{name}_granularity")).is_none() {
            return Ok(Self { tensor, parts: None });
        }
        let granularity = granularity(case, name)?;
        let count = granularity.scales(shape).unwrap_or(0);
        let seed = case.parsed("input_seed", 0);
        let step = if case.text(name) == "int8" { 256.0 } else { 32.0 };
        let has = |what: &str| case.is_true(&format!("{name}_{what}"));
        let scale = |n| (8 + (word(seed, SCALES + number, n) >> 61)) as f32 / step;
        let zero_point = |n| (word(seed, ZERO_POINTS + number, n) >> 61) as i32 - 4;
        let means = shape[0] * shape[1] * shape[3];
        let parts = Parts {
            granularity,
            scales: (0..count).map(scale).collect(),
            zero_points: has("zero_points").then(|| (0..count).map(zero_point).collect()),
            channel_means: has("channel_means").then(|| (0..means).map(|n| real(word(seed, CHANNEL_MEANS + number, n))).collect()),
            rotated: has("rotated"),
        };
        Ok(Self { tensor, parts: Some(parts) })
    }

    fn view(&self) -> mfa::Result<TensorView<'_>> {
        let view = self.tensor.view()?;
        let Some(parts) = &self.parts else { return Ok(view) };
        let mut quantization = Quantization::new(parts.granularity, &parts.scales).rotated(parts.rotated);
        if let Some(zero_points) = &parts.zero_points {
            quantization = quantization.zero_points(zero_points);
        }
        if let Some(channel_means) = &parts.channel_means {
            quantization = quantization.channel_means(channel_means);
        }
        view.quantized(quantization)
    }
}

// ---- Operations --------------------------------------------------------------------------------------------------------------------------

/// Names of results and their hashes.
type Outputs = Vec<(&'static str, u64)>;

struct Shapes {
    query: [usize; 4],
    key: [usize; 4],
    value: [usize; 4],
    output: [usize; 4],
}

impl Shapes {
    fn of(case: Case) -> Self {
        let (batch, heads, channels) = (case.size("batch_size", 1), case.size("num_heads", 1), case.size("head_dim", 1));
        let (kv_heads, channels_v) = (case.size("num_kv_heads", heads), case.size("head_dim_v", channels));
        let (rows, columns) = (case.size("seq_len_q", 1), case.size("seq_len_kv", 1));
        Self {
            query: [batch, heads, rows, channels],
            key: [batch, kv_heads, columns, channels],
            value: [batch, kv_heads, columns, channels_v],
            output: [batch, heads, rows, channels_v],
        }
    }
}

/// How a float operand is to be quantised.
fn operand_scheme(case: Case, name: &str) -> Done<Option<OperandScheme>> {
    let field = format!("quantize_{name}");
    if case.find(&field).is_some() && matches!(case.text(name), "int8" | "int4") {
        return inexpressible("operands that come quantised are taken as they are");
    }
    let scheme = match case.text(&field) {
        "" => return Ok(None),
        "int8" => QuantizationScheme::int8(),
        "int4" => QuantizationScheme::int4(),
        other => return inexpressible(format!("a scheme is for codes, not for {other}")),
    };
    let has = |what: &str| case.is_true(&format!("{field}_{what}"));
    let scheme = scheme.granularity(granularity(case, &field)?).symmetric(!has("asymmetric")).smooth(has("smooth")).rotate(has("rotate"));
    Ok(Some(scheme.into()))
}

fn side(case: Case, name: &str) -> Done<Option<u64>> {
    match case.parsed(name, -1i64) {
        -1 => Ok(None),
        keys => u64::try_from(keys).map(Some).or_else(|_| inexpressible("a window is of as many keys as a u64 can say")),
    }
}

fn run_attention(case: Case, context: &MfaContext, outputs: &mut Outputs) -> Done {
    let shapes = Shapes::of(case);
    let heads = shapes.query[1];
    let query = Operand::new(case, "query", shapes.query, 0)?;
    let key = Operand::new(case, "key", shapes.key, 1)?;
    let value = Operand::new(case, "value", shapes.value, 2)?;
    let mut output = Tensor::new(case, case.text("output"), shapes.output, None)?;
    let rows = elements_of(&shapes.output[..3])?;
    let is_double = ["query", "key", "value"].iter().any(|name| case.text(name) == "float64");
    let numbers = |count: usize, stream: u64| Numbers::new(case, count, is_double, Some(stream));
    let mut logsumexp = Numbers::new(case, rows, is_double, None);

    let mask = if case.find("mask").is_some() { Some(Tensor::mask(case)?) } else { None };
    let (kv_lengths, query_offsets) = (case.list("kv_lengths"), case.list("query_offsets"));
    let slopes = case.is_true("alibi_slopes").then(|| numbers(heads, ALIBI_SLOPES));
    let sinks = case.is_true("sinks").then(|| numbers(heads, SINKS));
    let alignment = match case.parsed("alignment", 0) {
        0 => Alignment::UpperLeft,
        1 => Alignment::LowerRight,
        _ => return inexpressible("there is no such alignment"),
    };
    let mut attention = Attention::new()
        .softmax_scale(case.parsed("softmax_scale", 1.0))
        .softcap(case.parsed("softcap", 0.0))
        .window(side(case, "window_left")?, side(case, "window_right")?)
        .dropout(case.parsed("dropout_p", 0.0), case.parsed("seed", 0), case.parsed("dropout_offset", 0))
        .quantize(QuantizationConfig {
            query: operand_scheme(case, "query")?,
            key: operand_scheme(case, "key")?,
            value: operand_scheme(case, "value")?,
        });
    attention = if case.is_true("causal") { attention.causal(alignment) } else { attention.alignment(alignment) };
    if let Some(mask) = &mask {
        attention = attention.mask(mask.view()?);
    }
    if let Some(lengths) = &kv_lengths {
        attention = attention.kv_lengths(lengths);
    }
    if let Some(offsets) = &query_offsets {
        attention = attention.query_offsets(offsets);
    }
    if let Some(slopes) = &slopes {
        attention = attention.alibi_slopes(slopes.view());
    }
    if let Some(sinks) = &sinks {
        attention = attention.sinks(sinks.view());
    }
    let (query, key, value) = (query.view()?, key.view()?, value.view()?);
    let done = attention.forward_with_logsumexp(context, query, key, value, output.view_mut()?, logsumexp.view_mut());
    if case.text("operation") == "forward" {
        outputs.extend([("output", output.values.hash()), ("logsumexp", logsumexp.hash())]);
        return Ok(done?);
    }
    done?;

    let wants = |name: &str| case.text("gradients").split(',').any(|each| each == name);
    let gradient = |name, shape| if wants(name) { Tensor::new(case, case.text("gradient"), shape, None).map(Some) } else { Ok(None) };
    let grad_output = Tensor::new(case, case.text("output"), shapes.output, Some(GRAD_OUTPUT))?;
    let grad_logsumexp = case.is_true("grad_logsumexp").then(|| numbers(rows, GRAD_LOGSUMEXP));
    let mut tensors =
        [("query", gradient("query", shapes.query)?), ("key", gradient("key", shapes.key)?), ("value", gradient("value", shapes.value)?)];
    let mut grad_mask = match &mask {
        Some(mask) if wants("mask") => {
            let values = Values::before(case.text("mask"), elements_of(&mask.shape)?)?;
            Some(Tensor { values, shape: mask.shape, tokens_first: false })
        }
        _ => None,
    };
    let mut vectors = ["sinks", "alibi_slopes"].map(|name| (name, wants(name).then(|| Numbers::new(case, heads, is_double, None))));

    let mut gradients = Gradients::new(grad_output.view()?);
    if !case.is_true("without_output") {
        gradients = gradients.output(output.view()?);
    }
    if let Some(grad_logsumexp) = &grad_logsumexp {
        gradients = gradients.grad_logsumexp(grad_logsumexp.view());
    }
    for (name, tensor) in &mut tensors {
        let Some(tensor) = tensor else { continue };
        let view = tensor.view_mut()?;
        gradients = match *name {
            "query" => gradients.query(view),
            "key" => gradients.key(view),
            _ => gradients.value(view),
        };
    }
    if let Some(grad_mask) = &mut grad_mask {
        gradients = gradients.mask(grad_mask.view_mut()?);
    }
    for (name, vector) in &mut vectors {
        let Some(vector) = vector else { continue };
        gradients = if *name == "sinks" { gradients.sinks(vector.view_mut()) } else { gradients.alibi_slopes(vector.view_mut()) };
    }
    let done = attention.backward(context, query, key, value, logsumexp.view(), gradients);
    outputs.extend(tensors.iter().filter_map(|(name, tensor)| Some((*name, tensor.as_ref()?.values.hash()))));
    outputs.extend(grad_mask.iter().map(|mask| ("mask", mask.values.hash())));
    outputs.extend(vectors.iter().filter_map(|(name, vector)| Some((*name, vector.as_ref()?.hash()))));
    Ok(done?)
}

fn run_quantize(case: Case, context: &MfaContext, outputs: &mut Outputs) -> Done {
    let shape = Shapes::of(case).query;
    let input = Tensor::new(case, case.text("query"), shape, Some(0))?;
    let mut codes = Tensor::new(case, case.text("codes"), shape, None)?;
    let granularity = granularity(case, "codes")?;
    let scheme = if case.text("codes") == "int8" { QuantizationScheme::int8() } else { QuantizationScheme::int4() };
    let scheme = scheme
        .granularity(granularity)
        .symmetric(!case.is_true("codes_zero_points"))
        .smooth(case.is_true("codes_channel_means"))
        .rotate(case.is_true("codes_rotated"));
    let count = granularity.scales(shape).unwrap_or(0);
    let mut scales = vec![0.0f32; count];
    let mut zero_points = case.is_true("codes_zero_points").then(|| vec![0i32; count]);
    let mut means = case.is_true("codes_channel_means").then(|| vec![0.0f32; shape[0] * shape[1] * shape[3]]);
    let (input, output) = (input.view()?, codes.view_mut()?);
    let done = mfa::quantize_into(context, input, scheme, output, &mut scales, zero_points.as_deref_mut(), means.as_deref_mut());
    outputs.push(("codes", codes.values.hash()));
    outputs.push(("scales", hash_of(scales.iter().map(|scale| scale.to_ne_bytes()))));
    outputs.extend(zero_points.iter().map(|points| ("zero_points", hash_of(points.iter().map(|point| point.to_ne_bytes())))));
    outputs.extend(means.iter().map(|means| ("channel_means", hash_of(means.iter().map(|mean| mean.to_ne_bytes())))));
    Ok(done?)
}

fn run_dequantize(case: Case, context: &MfaContext, outputs: &mut Outputs) -> Done {
    let shape = Shapes::of(case).query;
    let codes = Operand::new(case, "codes", shape, 0)?;
    let mut output = Tensor::new(case, case.text("output"), shape, None)?;
    let done = mfa::dequantize(context, codes.view()?, output.view_mut()?);
    outputs.push(("output", output.values.hash()));
    Ok(done?)
}

fn run_merge(case: Case, context: &MfaContext, outputs: &mut Outputs) -> Done {
    let shape = Shapes::of(case).query;
    let rows = elements_of(&shape[..3])?;
    let a = Tensor::new(case, case.text("query"), shape, Some(0))?;
    let b = Tensor::new(case, case.text("key"), shape, Some(1))?;
    let mut output = Tensor::new(case, case.text("output"), shape, None)?;
    let (lse_a, lse_b) = (Numbers::new(case, rows, false, Some(GRAD_LOGSUMEXP)), Numbers::new(case, rows, false, Some(MASK)));
    let mut logsumexp = Numbers::new(case, rows, false, None);
    let first = Partial { output: a.view()?, logsumexp: lse_a.view() };
    let second = Partial { output: b.view()?, logsumexp: lse_b.view() };
    let done = mfa::merge(context, first, second, output.view_mut()?, logsumexp.view_mut());
    outputs.extend([("output", output.values.hash()), ("logsumexp", logsumexp.hash())]);
    Ok(done?)
}

fn run(case: Case, context: &MfaContext, outputs: &mut Outputs) -> Done {
    for field in ["null", "query_precision_code", "value_precision_code"] {
        if case.find(field).is_some() {
            return inexpressible(format!("{field} is for callers of C"));
        }
    }
    match case.text("operation") {
        "forward" | "backward" => run_attention(case, context, outputs),
        "quantize" => run_quantize(case, context, outputs),
        "dequantize" => run_dequantize(case, context, outputs),
        "merge" => run_merge(case, context, outputs),
        _ => inexpressible("the flat functions are for callers of C"),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let device = match arguments.next().as_deref() {
        Some("metal") => Device::Metal,
        Some("softmetal") => Device::SoftMetal,
        _ => Device::Cpu,
    };
    let threads = arguments.next().map_or(Ok(0), |threads| threads.parse())?;
    let context = MfaContext::builder().device(device).num_threads(threads).build()?;
    let mut results = BufWriter::new(std::io::stdout());
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let case = Case(&line);
        let mut outputs = Outputs::new();
        let done = run(case, &context, &mut outputs);
        let hashes: Vec<String> = outputs.iter().map(|(name, hash)| format!("\"{name}\": \"{hash:016x}\"")).collect();
        let (id, hashes) = (case.text("id"), hashes.join(", "));
        // Texts of Rust's are quoted almost as JSON's: messages and reasons have neither control characters nor others than ASCII.
        match done {
            Ok(()) => writeln!(results, "{{\"id\": {id:?}, \"outputs\": {{{hashes}}}, \"status\": 0, \"message\": \"\"}}")?,
            Err(Failure::Inexpressible(reason)) => writeln!(results, "{{\"id\": {id:?}, \"skipped\": {reason:?}}}")?,
            Err(Failure::Refused(error)) => {
                let (status, message) = (error.status(), error.message());
                writeln!(results, "{{\"id\": {id:?}, \"outputs\": {{{hashes}}}, \"status\": {status}, \"message\": {message:?}}}")?;
            }
        }
    }
    Ok(results.flush()?)
}
