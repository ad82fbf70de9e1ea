import MFA
import Support

/// A context as C callers see it: with the last error's message, and what the flat functions remember. Guarded by the context's lock.
final class ContextEntry {
    let context: Context
    /// The message of the last call that failed.
    let message: UnsafeMutablePointer<CChar>
    /// What flat forward calls left for the backward calls.
    var records = TrainingRecords()
    /// The scales and zero points that a flat call passes by value: of query, key and value.
    let scales: UnsafeMutablePointer<Float>
    let zeroPoints: UnsafeMutablePointer<Int32>

    init(_ context: Context) {
        self.context = context
        message = .allocate(capacity: Int(SUPPORT_MESSAGE_BYTES))
        message.initialize(repeating: 0, count: Int(SUPPORT_MESSAGE_BYTES))
        scales = .allocate(capacity: 3)
        scales.initialize(repeating: 1, count: 3)
        zeroPoints = .allocate(capacity: 3)
        zeroPoints.initialize(repeating: 0, count: 3)
    }

    /// Forgets records that a thread which no longer exists, after fork(), may have been changing: they cannot be relied on, not even to be
    /// freed.
    func abandonRecords() {
        _ = Unmanaged.passRetained(Abandoned(records))
        records = TrainingRecords()
    }

    private final class Abandoned {
        private let records: TrainingRecords

        init(_ records: TrainingRecords) {
            self.records = records
        }
    }

    deinit {
        message.deallocate()
        scales.deallocate()
        zeroPoints.deallocate()
    }
}

/// Keeps a message: "function: what was expected and what was given".
func keep(_ error: MFAError, of function: StaticString, in message: UnsafeMutablePointer<CChar>) {
    var text = "\(function): \(error.message)"
    text.withUTF8 { bytes in
        bytes.withMemoryRebound(to: CChar.self) { characters in
            if let start = characters.baseAddress { support_message_copy(message, start, characters.count) }
        }
    }
}

/// Runs the body of a function that has no context to keep its error.
func withoutContext(_ function: StaticString, _ body: () throws(MFAError) -> Void) -> Int32 {
    do throws(MFAError) {
        try body()
        return Status.success.rawValue
    } catch {
        keep(error, of: function, in: support_thread_message())
        return error.status.rawValue
    }
}

/// Runs the body of a function that works in a context, while no other call does.
func withContext(
    _ token: UInt, _ function: StaticString, _ body: (ContextEntry, Session) throws(MFAError) -> Void
) -> Int32 {
    guard let entry = findContext(token) else {
        return withoutContext(function) { () throws(MFAError) in throw invalidContext(token) }
    }
    do throws(MFAError) {
        try entry.context.exclusively { (session) throws(MFAError) in
            if !session.isWhole { entry.abandonRecords() }
            do throws(MFAError) {
                try body(entry, session)
            } catch {
                keep(error, of: function, in: entry.message)
                throw error
            }
        }
        return Status.success.rawValue
    } catch {
        return error.status.rawValue
    }
}

/// The entry of a context's token, nil if it is none.
func findContext(_ token: UInt) -> ContextEntry? {
    handles.find(token, .context).map { unsafeDowncast($0, to: ContextEntry.self) }
}

func invalidContext(_ token: UInt) -> MFAError {
    MFAError(.invalidContext, token == 0 ? "`context` must not be NULL" : "`context` is destroyed or is not a context")
}
